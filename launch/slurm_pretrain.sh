#!/bin/bash
# One task a GPU, started by srun itself: Slurm's signals reach every rank, and no launcher stands between.
#   sbatch --nodes 8 launch/slurm_pretrain.sh --ds_config ds_configs/zero2.json --data.train /data/imagenet --run_dir runs/b
# Slurm warns 300 s before the time is over; the run then writes a checkpoint and stopped.json, and is queued again.
#SBATCH --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
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

export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
rm -f "$run_dir/stopped.json" # of an earlier start: not to be queued again for ever where this one fails at once
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" python launch/pretrain.py "$@"
code=$?
if [ -e "$run_dir/stopped.json" ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
