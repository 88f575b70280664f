"""Run the grid of committed results; a stopped grid resumes where it was.

    python results/grid.py --part 1 --jobs 2            two runs at a time, one thread each
    python results/grid.py --part 1 --list              one command a line, for xargs or Slurm
    python results/grid.py --only iql --seeds 0-2 --env hopper-medium-replay --steps 100000

A line of the list stands alone: it skips what is finished, resumes what was stopped or has fewer
updates, and copies the finished run's result.json to results/scores/<algorithm>/<env>/seed<k>.json,
from which report.py makes tables and pictures. Results of many machines are merged by path.
"""
import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]  # finds common.py and the algorithms
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
    "bc": "bc.py --steps 20000",
}
MODES = {  # shorter studies of single forms
    "cql-h": "cql.py --steps 20000 --form cql-h",
    "cql-plain": "cql.py --steps 20000 --form plain",
    "morel-soft": "morel.py --steps 20000 --penalty soft",
    "combo-uniform": "combo.py --steps 20000 --rollout-policy uniform",
}
# what MOPO's penalty is good for
PENALTY = {"mopo-no-penalty": "mopo.py --steps 100000 --penalty-weight 0"}
STUDIES = {  # settings whose published value fails on this suite, one factor at a time; a tenth of
    # the episodes is held out, so that fqe.py can choose between the policies
    "awac-beta-2": "awac.py --steps 40000 --beta 2 --holdout 0.1",
    "awac-beta-10": "awac.py --steps 40000 --beta 10 --holdout 0.1",
    "awac-beta-50": "awac.py --steps 40000 --beta 50 --holdout 0.1",
    "plas-vae-lr-1e-4": "plas.py --steps 20000 --vae-steps 20000 --vae-lr 1e-4 --holdout 0.1",
    "plas-vae-lr-1e-3": "plas.py --steps 20000 --vae-steps 20000 --vae-lr 1e-3 --holdout 0.1",
    "bear-actor-lr-1e-4": "bear.py --steps 12000 --warm-up-steps 4000 --actor-lr 1e-4 "
                          "--holdout 0.1 --eval-every 2000",
    "bear-actor-lr-1e-3": "bear.py --steps 12000 --warm-up-steps 4000 --actor-lr 1e-3 "
                          "--holdout 0.1 --eval-every 2000",
    "bear-mmd-0.12": "bear.py --steps 12000 --warm-up-steps 4000 --actor-lr 1e-3 --max-mmd 0.12 "
                     "--holdout 0.1 --eval-every 2000",
    "morel-horizon-5": "morel.py --steps 20000 --horizon 5 --dynamics-epochs 10 --holdout 0.1",
    "morel-horizon-25": "morel.py --steps 20000 --horizon 25 --dynamics-epochs 10 --holdout 0.1",
    "morel-horizon-100": "morel.py --steps 20000 --horizon 100 --dynamics-epochs 10 --holdout 0.1",
}
RATES = {  # how fast Q can grow: the target networks set the pace
    "iql-target-rate-0.005": "iql.py --steps 20000 --actor-lr 1e-3 --critic-lr 1e-3 "
                             "--eval-every 5000",
    "iql-target-rate-0.02": "iql.py --steps 20000 --actor-lr 1e-3 --critic-lr 1e-3 "
                            "--target-rate 0.02 --eval-every 5000",
    "td3_bc-target-rate-0.02": "td3_bc.py --steps 20000 --target-rate 0.02 --eval-every 5000",
    "awac-target-rate-0.02": "awac.py --steps 20000 --target-rate 0.02 --eval-every 5000",
    "rebrac-target-rate-0.02": "rebrac.py --steps 20000 --target-rate 0.02 --eval-every 5000",
    "bcq-target-rate-0.02": "bcq.py --steps 24000 --target-rate 0.02 --eval-every 4000",
    "bear-target-rate-0.02": "bear.py --steps 20000 --warm-up-steps 4000 --target-rate 0.02 "
                             "--eval-every 4000",
    "edac-target-rate-0.02": "edac.py --steps 20000 --num-critics 10 --target-rate 0.02 "
                             "--eval-every 4000",
    "cql-target-rate-0.02": "cql.py --steps 20000 --target-rate 0.02 --eval-every 4000",
}
WEIGHTS = {  # of discrete CQL's term, on data where Q hardly depends on the action
    "cql_discrete-weight-0.1": "cql_discrete.py --steps 100000 --cql-weight 0.1",
    "cql_discrete-weight-0.01": "cql_discrete.py --steps 100000 --cql-weight 0.01",
}
HORIZONS = {  # other rollouts in the model than the defaults', which have rows of their own
    "mopo-horizon-5": "mopo.py --steps 100000 --dynamics-epochs 10 --horizon 5",
    "morel-horizon-50": "morel.py --steps 50000 --dynamics-epochs 10 --horizon 50 "
                        "--eval-every 5000",
    "morel-horizon-50-beta-15": "morel.py --steps 50000 --dynamics-epochs 10 --horizon 50 "
                                "--beta 15 --eval-every 5000",
    "morel-beta-15": "morel.py --steps 50000 --dynamics-epochs 10 --beta 15 --eval-every 5000",
}
# runs that differ from a default in one setting
ONE_AT_A_TIME = STUDIES | RATES | WEIGHTS | HORIZONS
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
    "penalty": (["hopper-medium", "halfcheetah-medium-replay"], PENALTY, "0"),
    "studies": (["hopper-medium"], STUDIES, "0"),
    "rates": (["hopper-medium-replay"], RATES, "0"),
    "weights": (["acrobot-replay"], WEIGHTS, "0-2"),
    "horizons": (["hopper-medium"], HORIZONS, "0"),
}


def seeds_of(text: str) -> list[int]:
    """'0-2' -> [0, 1, 2]; '3' -> [3]."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def lines(options) -> list[str]:
    """The commands that the options choose, part by part; seeds of one file together."""
    chosen = []
    history = "--history " if options.history else ""
    for part, (datasets, files, seeds) in PARTS.items():
        if options.part not in (None, part):
            continue
        for env in datasets:
            for name, command in files.items():
                if options.only not in (None, name) or options.env not in (None, env):
                    continue
                if options.steps is not None:
                    command = re.sub(r"--steps \d+", f"--steps {options.steps}", command)
                # a study's runs differ in a setting only, so each needs a place of its own
                out = f"{options.out}/{name}" if name in ONE_AT_A_TIME else options.out
                every = "" if "--eval-every" in command else " --eval-every 10000"
                for seed in seeds_of(options.seeds or seeds):
                    chosen.append(
                        f"python results/grid.py {history}--run {name} algorithms/{command}{every} "
                        f"--env {env} --seed {seed} --threads 1 --out {shlex.quote(out)}")
    return chosen


def keep(folder: Path) -> None:
    """A copy of the run's checkpoint, if it is a new one, for overestimation.py."""
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        copy = folder / "history" / f"{int(checkpoint.stat().st_mtime)}.pt"
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists():
            shutil.copy(checkpoint, copy)


def other_settings(result: dict, command: list[str]) -> list[str]:
    """What a finished run has set otherwise than this command would."""
    file = importlib.import_module(Path(command[0]).stem)  # late: it brings torch
    from common import MAY_CHANGE

    import tyro

    free = set(MAY_CHANGE) - {"final_episodes", "eval_env"}
    usual = file.Args(**getattr(file, "TUNED", {}).get(result.get("env"), {}))
    wanted = asdict(tyro.cli(file.Args, default=usual, args=command[1:]))
    return [f"{key} {value}" for key, value in result.get("args", {}).items()
            if key not in free and wanted.get(key) != value]


def data_now(result: dict) -> dict:
    """What is known of the dataset that the run of this result would learn from now."""
    from common import load_dataset

    holdout = result["args"].get("holdout", 0.0)  # earlier results lack it
    return load_dataset(result["env"], "cpu", None, True, "none", holdout=holdout).describe()


def run(name: str, command: list[str], history: bool) -> int:
    """One run: skipped where it is finished, resumed where it was stopped; its result is copied."""
    def value(option: str) -> str:
        return command[command.index(option) + 1]

    env, seed = value("--env"), value("--seed")
    algorithm = Path(command[0]).stem if name in ONE_AT_A_TIME else name
    folder = ROOT / os.path.expanduser(value("--out")) / algorithm / env / f"seed{seed}"
    result = folder / "result.json"
    try:
        before = json.loads(result.read_text()) if result.exists() else {"steps": 0}
        done = before["steps"]
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"error: {result} is damaged; move {folder}, or give another --out")
    other = other_settings(before, command) if done else []
    if other:
        sys.exit(f"error: {folder} is of another run ({', '.join(other)}); move it, or give "
                 "another --out")
    if done >= int(value("--steps")) and before["dataset"] != data_now(before):
        sys.exit(f"error: {folder} has learned from other data of the name {env} than are there "
                 "now; move it, or give another --out")
    if done < int(value("--steps")):
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        if done and algorithm == "iql":
            resume = []  # its learning rate is 0 at the last step: a longer run begins anew
        child = subprocess.Popen([sys.executable, *command, *resume], cwd=ROOT,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # it saves and leaves
        try:
            while child.poll() is None:
                time.sleep(1)
                if history:
                    keep(folder)
        except KeyboardInterrupt:
            child.wait()  # Ctrl-C reached it, too: it saves and leaves
        if child.returncode:
            return child.returncode
    committed = ROOT / "results" / "scores" / name / env / f"seed{seed}.json"
    committed.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "result.json", committed)
    return 0


def run_all(commands: list[list[str]], jobs: int) -> int:
    """Some commands at a time. Ctrl-C and SIGTERM let the runs save, and start no other one."""
    children = []
    stopped = threading.Event()

    def run_one(command: list[str]) -> int:
        if stopped.is_set():
            return 2
        child = subprocess.Popen(command, cwd=ROOT)
        children.append(child)
        code = child.wait()
        if code != 0:
            stopped.wait(1)  # the Ctrl-C that ended it may still be on its way to this process
        return code

    def stop(*_) -> None:
        for child in children:
            child.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return max(pool.map(run_one, commands))
        except KeyboardInterrupt:
            stopped.set()
            print("error: stopped; the same command resumes", file=sys.stderr)
            return 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), help="one part of the grid; default: all")
    parser.add_argument("--only", help="only the runs with this name")
    parser.add_argument("--env", help="only the runs on this dataset")
    parser.add_argument("--seeds", help="0-2 or 0; default: as the part has them")
    parser.add_argument("--steps", type=int, help="updates of each run; default: as in the grid")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs", help="where the runs' folders go, from the root")
    parser.add_argument("--history", action="store_true", help="keep each checkpoint of a run")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="a line of the list: NAME COMMAND")
    options = parser.parse_args()
    if options.run is not None:
        for needed in ("--env", "--seed", "--steps", "--out"):
            if needed not in options.run[:-1]:
                parser.error(f"--run needs a whole line of --list; {needed} is missing")
        return run(options.run[0], options.run[1:], options.history)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one run at a time")
    try:
        commands = lines(options)
    except ValueError:
        parser.error(f"--seeds {options.seeds}: give one seed, or a range as 0-2")
    if not commands:
        parser.error("the grid has no run with these options; --list alone prints all of them")
    if options.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` ends without an error
        print("\n".join(commands))
        return 0
    return run_all([[sys.executable, *shlex.split(line)[1:]] for line in commands], options.jobs)


if __name__ == "__main__":
    sys.exit(main())
