#!/usr/bin/env bash
# The grid as a Slurm job array, a line of grid.py --list for each task:
#   mkdir -p runs; python results/grid.py --part 1 --list > lines.txt
#   sbatch --array=1-$(wc -l < lines.txt) results/slurm.sh lines.txt
# Before its time limit, or when it is preempted, a task saves its run and returns to the queue.
#SBATCH --cpus-per-task=1 --mem=4G --time=04:00:00
#SBATCH --requeue --open-mode=append --output=runs/slurm-%A_%a.log
#SBATCH --signal=B:TERM@120
cd "$SLURM_SUBMIT_DIR" || exit 1
line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
PATH="$PWD/.venv/bin:$PATH" bash -c "exec $line" &
child=$!
trap 'trap "" TERM; kill -TERM $child; wait $child
      scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"; exit 0' TERM
wait $child
