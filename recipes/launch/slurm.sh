#!/bin/bash
# Llama-2-7B on two nodes of 8 GPUs, sharded with FSDP2 over all 16. Run once on the login node: make install. Then:
#
#   sbatch recipes/launch/slurm.sh
#   sbatch --nodes 4 recipes/launch/slurm.sh sft --config recipes/llama2-13b/sft.yaml recipes/methods/hft.yaml
#
# Arguments after the script are passed to `hft`, such as `--engine zero3`. The folder must be on a file system that all
# nodes see. Submit the job again to resume a run that was killed.
#SBATCH --job-name=hft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

if [ $# -eq 0 ]; then
    set -- sft --config recipes/llama2-7b/sft.yaml recipes/methods/hft.yaml
fi
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# One `hft` per node starts a process per GPU; only the node knows its own rank.
srun bash -c '
    .venv/bin/hft "$@" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --main_process_ip "$0"
' "$head" "$@"
