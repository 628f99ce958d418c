#!/bin/bash
# Start one task a GPU with srun, without a launcher, so that Slurm's signals reach every rank.
#   sbatch --nodes 8 launch/slurm_pretrain.sh --ds_config ds_configs/zero2.json --data.train /data/imagenet --run_dir runs/b
# Slurm sends USR1 300 s before the time limit; the run then writes a checkpoint and stopped.json, and is requeued.
#SBATCH --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --signal=USR1@300 --requeue --open-mode=append

run_dir=""
args=("$@")
for ((i = 0; i < $#; i++)); do
    case "${args[i]}" in
        --run_dir=*) run_dir="${args[i]#*=}" ;;
        --run_dir) run_dir="${args[i + 1]}" ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "slurm_pretrain.sh: --run_dir is missing. Pass --run_dir FOLDER, a folder that all nodes share." >&2
    exit 2
fi

export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
rm -f "$run_dir/stopped.json" # left by an earlier start; it would requeue a job that fails at once for ever
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" python launch/pretrain.py "$@"
code=$?
if [ -e "$run_dir/stopped.json" ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
