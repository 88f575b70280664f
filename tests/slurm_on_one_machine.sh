#!/usr/bin/env bash
# results/slurm.sh against a real Slurm on one machine, tasks stopped and resumed; outside `make test`.
# Needs root, munge and slurm-wlm (apt install slurm-wlm), and `make setup`. Works in a copy of the repository.
#   tests/slurm_on_one_machine.sh [EMPTY FOLDER]      (STEPS=400 before it on a slow machine)
# Starts munged, slurmctld and slurmd on loopback and runs ten short lines as arrays with room for two tasks. A job of a
# higher partition preempts two tasks, one task meets its time limit. Then every line runs once more outside Slurm, and
# every number must be the same.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"/{state,spool,log,runs}
cp -r "$repo"/{algorithms,results,common.py} "$work/"
rm -rf "$work/results/scores"
ln -sfn "$repo/.venv" "$work/.venv"
cd "$work"
export PATH=$work/.venv/bin:$PATH OMP_NUM_THREADS=1 SLURM_CONF=$work/slurm.conf MINARI_DATASETS_PATH=$work/minari
python results/behavior/collect.py pendulum-random > log/build.log 2>&1
host=$(hostname -s)
cat > slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=$(awk '/MemTotal/{print int($2/1024)-1000}' /proc/meminfo) State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=$host PriorityTier=2 PreemptMode=OFF State=UP
CONF
stop() {
  scancel --user root || true
  for _ in $(seq 40); do [ -z "$(squeue -h)" ] || sleep 1; done
  for daemon in slurmd slurmctld munged; do
    [ ! -e "$work/$daemon.pid" ] || kill "$(cat "$work/$daemon.pid")" || true
  done
}
trap stop EXIT
if [ ! -e /run/munge/munge.socket.2 ]; then
  mkdir -p /run/munge && chown munge: /run/munge
  runuser -u munge -- munged --pid-file=/run/munge/munged.pid
  ln -s /run/munge/munged.pid munged.pid
fi
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for seed in 0 1 2 3 4; do
  steps=${STEPS:-3000}
  if [ $seed = 0 ] || [ $seed = 4 ]; then steps=$((4 * steps)); fi  # these are stopped, and must last until then
  for name in td3_bc bc; do
    echo "python results/grid.py --run $name algorithms/$name.py --steps $steps --eval-every 100 --eval-episodes 2" \
         "--final-episodes 4 --env pendulum-random --seed $seed --threads 1 --out runs"
  done
done > lines.txt
sbatch --array=1-8,10 results/slurm.sh lines.txt
until [ -e runs/td3_bc/pendulum-random/seed0/checkpoint.pt ]; do sleep 0.5; done
squeue
sbatch -p high --cpus-per-task=2 -o log/high.log --wrap "sleep 5"  # takes both CPUs: two tasks must go
until grep -q "preempted" log/slurmctld.log; do sleep 1; done
limited=$(sbatch --parsable --array=9 results/slurm.sh lines.txt)
until [ -z "$(squeue -h)" ]; do
  sleep 2
  if [ -e runs/td3_bc/pendulum-random/seed4/checkpoint.pt ] && [ ! -e limit.txt ]; then
    minutes=$(squeue -h -j "${limited}_9" -o %M | awk -F: '{print $(NF - 1)}')
    scontrol update JobId="${limited}_9" TimeLimit=$((10#$minutes + 2)) && date > limit.txt  # less than two minutes are left
  fi
  for id in $(squeue -h -t PD -o "%i %r" | awk '$2 == "BeginTime" {print $1}'); do
    scontrol update JobId="$id" StartTime=now TimeLimit=60  # a requeued task would wait for two minutes
  done
done
grep -i "preempted\|requeu" log/slurmctld.log
grep -ho "error: stopped.*" runs/slurm-*.log
for log in runs/slurm-1_1.log runs/slurm-"$limited"_9.log; do
  [ "$(grep -o "writes runs/" "$log" | wc -l)" -ge 2 ] || { echo "$log: was not started twice"; exit 1; }
done
grep -q "stopped after step" runs/slurm-1_1.log || { echo "the preempted task did not save"; exit 1; }
grep -q "stopped after step" runs/slurm-"$limited"_9.log || { echo "the task with a time limit did not save"; exit 1; }
while read -r line; do bash -c "${line/--out runs/--out alone}" > /dev/null 2>&1; done < lines.txt
python - <<'PY'
import json
from pathlib import Path
paths = sorted(Path("runs").glob("*/*/*/result.json"))
assert len(paths) == 10, paths
for path in paths:
    ours, other = (json.loads(p.read_text()) for p in (path, Path("alone") / path.relative_to("runs")))
    assert ours["curve"] == other["curve"] and ours["final_returns"] == other["final_returns"], path
    print(path, "equal:", ours["score"])
PY
