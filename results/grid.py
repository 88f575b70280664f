"""Run the grid of committed results; a stopped grid resumes where it was.

    python results/grid.py --part 1 --jobs 2            two runs at a time, one thread each
    python results/grid.py --part 1 --list              one command a line, for xargs or Slurm
    python results/grid.py --only iql --seeds 0-2 --env hopper-medium-replay

A line of the list stands alone: it skips what is finished, resumes what was stopped, and copies the
finished run's result.json to results/scores/<algorithm>/<env>/seed<k>.json, from which report.py
makes tables and pictures. Results of many machines are merged by path.
"""
import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIGHT = {  # name of the result: the file and its arguments
    "bc": "bc.py --steps 100000",
    "td3_bc": "td3_bc.py --steps 300000",
    "iql": "iql.py --steps 300000",
    "awac": "awac.py --steps 300000",
    "crr": "crr.py --steps 300000",
    "awr": "awr.py --steps 1000000 --eval-every 50000",
    "brac-p": "brac.py --steps 300000",
    "brac-v": "brac.py --steps 300000 --value-penalty",
    "plas": "plas.py --steps 300000",
    "mopo": "mopo.py --steps 300000",
    "morel": "morel.py --steps 300000",
    "sac": "sac.py --steps 100000",
    "algae_dice": "algae_dice.py --steps 300000",
}
MIDDLE = {
    "rebrac": "rebrac.py --steps 300000",
    "bcq": "bcq.py --steps 300000",
    "bear": "bear.py --steps 300000",
}
HEAVY = {
    "edac": "edac.py --steps 100000 --num-critics 10",
    "edac-sac-n": "edac.py --steps 100000 --num-critics 10 --diversity-weight 0",
    "msg": "msg.py --steps 100000 --num-critics 10",
    "cql": "cql.py --steps 100000",
    "combo": "combo.py --steps 100000",
    "decision_transformer": "decision_transformer.py --steps 100000",
    "mabcq": "mabcq.py --steps 100000",
    "mabcq-independent": "mabcq.py --steps 100000 --no-reweight",
    "uwac": "uwac.py --steps 60000",
}
DISCRETE = {
    "dqn": "dqn.py --steps 100000",
    "dqn-double": "dqn.py --steps 100000 --double",
    "rem": "rem.py --steps 100000",
    "rem-ensemble": "rem.py --steps 100000 --ensemble",
    "cql_discrete": "cql_discrete.py --steps 100000",
}
MODES = {  # shorter studies of single forms
    "cql-h": "cql.py --steps 20000 --form cql-h",
    "cql-plain": "cql.py --steps 20000 --form plain",
    "morel-soft": "morel.py --steps 20000 --penalty soft",
    "combo-uniform": "combo.py --steps 20000 --rollout-policy uniform",
}
OTHERS = [f"{body}-{level}" for body in ("hopper", "walker2d", "halfcheetah")
          for level in ("medium-expert", "random", "medium", "medium-replay")
          if (body, level) not in (("hopper", "medium"), ("hopper", "medium-replay"))]
PARTS = {  # part: datasets, files, seeds
    "1": (["hopper-medium-replay"], LIGHT, "0-2"),
    "2": (["hopper-medium-replay"], MIDDLE, "0"),
    "3": (["hopper-medium-replay"], HEAVY, "0"),
    "4": (["hopper-medium"], LIGHT, "0-2"),
    "5": (["hopper-medium"], MIDDLE | HEAVY, "0"),
    "6": (OTHERS, LIGHT | MIDDLE | HEAVY, "0"),
    "discrete": ([f"{body}-{level}" for body in ("cartpole", "acrobot")
                  for level in ("replay", "medium")], DISCRETE, "0-2"),
    "modes": (["hopper-medium-replay"], MODES, "0"),
}


def seeds_of(text: str) -> list[int]:
    """'0-2' -> [0, 1, 2]; '3' -> [3]."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def lines(options) -> list[str]:
    """The commands that the options choose, part by part; seeds of one file together."""
    chosen = []
    for part, (datasets, files, seeds) in PARTS.items():
        if options.part not in (None, part):
            continue
        for env in datasets:
            for name, command in files.items():
                if options.only not in (None, name) or options.env not in (None, env):
                    continue
                every = "" if "--eval-every" in command else " --eval-every 10000"
                for seed in seeds_of(options.seeds or seeds):
                    chosen.append(
                        f"python results/grid.py --run {name} algorithms/{command}{every} "
                        f"--env {env} --seed {seed} --threads 1 --out {options.out}")
    return chosen


def run(name: str, command: list[str]) -> int:
    """One run: skipped where it is finished, resumed where it was stopped; its result is copied."""
    def value(option: str) -> str:
        return command[command.index(option) + 1]

    env, seed = value("--env"), value("--seed")
    folder = ROOT / value("--out") / name / env / f"seed{seed}"
    if not (folder / "result.json").exists():
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        child = subprocess.Popen([sys.executable, *command, *resume], cwd=ROOT,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # it saves and leaves
        if code := child.wait():
            return code
    committed = ROOT / "results" / "scores" / name / env / f"seed{seed}.json"
    committed.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "result.json", committed)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), help="one part of the grid; default: all")
    parser.add_argument("--only", help="only the runs with this name")
    parser.add_argument("--env", help="only the runs on this dataset")
    parser.add_argument("--seeds", help="0-2 or 0; default: as the part has them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs", help="where the runs' folders go, from the root")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="a line of the list: NAME COMMAND")
    options = parser.parse_args()
    if options.run:
        return run(options.run[0], options.run[1:])
    commands = lines(options)
    if options.list:
        print("\n".join(commands))
        return 0
    with ThreadPoolExecutor(options.jobs) as pool:
        arguments = [[sys.executable, *shlex.split(line)[1:]] for line in commands]
        codes = list(pool.map(lambda one: subprocess.run(one, cwd=ROOT).returncode, arguments))
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
