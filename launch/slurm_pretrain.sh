#!/bin/bash
# One task a node, DeepSpeed's launcher inside each:
#   sbatch --nodes 8 launch/slurm_pretrain.sh --ds_config ds_configs/zero2.json --data.train /data/imagenet --run_dir runs/b
# Slurm warns 300 s before the time is over; the run then writes a checkpoint and stopped.json, and is queued again.
#SBATCH --ntasks-per-node=1 --gpus-per-node=8
#SBATCH --signal=USR1@300 --requeue --open-mode=append

run_dir=""
words=("$@")
for ((i = 0; i < $#; i++)); do
    case "${words[i]}" in
        --run_dir=*) run_dir="${words[i]#*=}" ;;
        --run_dir) run_dir="${words[i + 1]}" ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "slurm_pretrain.sh: name the run's folder with --run_dir" >&2
    exit 2
fi

hosts="hosts_$SLURM_JOB_ID"
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=${SLURM_GPUS_ON_NODE:-8}/" > "$hosts"
export MASTER_ADDR="$(head -n 1 "$hosts" | cut -d ' ' -f 1)" HOSTS="$hosts"
srun bash -c 'exec deepspeed --hostfile "$HOSTS" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" \
    launch/pretrain.py "$@"' pretrain "$@"
code=$?
rm -f "$hosts"
for _ in $(seq 30); do # deepspeed may leave before its ranks have written
    [ -e "$run_dir/stopped.json" ] || [ -e "$run_dir/finished.json" ] || [ $code -eq 2 ] && break
    sleep 1
done
if [ -e "$run_dir/stopped.json" ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
