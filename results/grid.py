"""Run the grid of committed results, one run after the other; a stopped grid goes on where it was.

    python results/grid.py --seed 0 [--only cql]          (several of these, each with another --only, may run side by side)

Each finished run's result.json is copied to results/<algorithm>/<env>/seed<k>.json, from which report.py makes the tables.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MUJOCO = [f"{body}-{level}" for body in ("hopper", "walker2d", "halfcheetah") for level in ("medium", "medium-replay")]
HOPPER = MUJOCO[:2]
DISCRETE = ("cartpole-replay", "cartpole-medium", "acrobot-replay", "acrobot-medium")
GRID = [  # (name, script and its arguments)
    *[("bc", f"bc.py --env {env} --steps 100000") for env in MUJOCO],
    *[(name, f"{name.split('-')[0]}.py --env {env} --steps {steps}") for env in HOPPER for name, steps in (  # half an hour each
        ("td3_bc", "100000"), ("iql", "100000"), ("crr", "100000"), ("awac", "100000"), ("awr", "1000000 --eval-every 50000"),
        ("brac-p", "80000 --behavior-steps 50000"), ("plas", "80000 --vae-steps 50000"),
        ("bcq", "28000 --eval-every 2000"), ("rebrac", "24000 --eval-every 2000"),
        ("bear", "20000 --warm-up-steps 4000 --eval-every 2000"))],
    ("sac", "sac.py --env hopper-medium --steps 100000"),
    ("cql", "cql.py --env hopper-medium --steps 20000 --eval-every 1000"),  # as many as an hour on one core allows
    *[(name, f"{name.split('-')[0]}.py --env {env} --steps {steps} {more}") for name, steps, more in (  # 40 minutes each
        ("mopo", 100_000, ""), ("mopo-no-penalty", 100_000, "--penalty-weight 0"), ("morel", 100_000, ""),
        ("combo", 8_000, "--eval-every 500")) for env, more in (
        ("hopper-medium", f"--dynamics-epochs 10 {more}"), ("halfcheetah-medium-replay", f"--dynamics-epochs 30 {more}"))],
    *[(name, f"{name.split('-')[0]}.py --env {env} --steps {steps}") for env in HOPPER for name, steps in (  # 40 minutes each
        ("edac", "16000 --num-critics 10 --eval-every 1000"),
        ("edac-sac-n", "16000 --num-critics 10 --diversity-weight 0 --eval-every 1000"),
        ("uwac", "5000 --warm-up-steps 1000 --eval-every 500"), ("algae_dice", "70000"))],
    ("decision_transformer", "decision_transformer.py --env hopper-medium-replay --steps 11000 --warmup-steps 1000 "
     "--eval-every 1000"),  # an hour
    *[(name, f"mabcq.py --env {env} --agents {agents} --steps {steps} --eval-every 1000 {more}") for env, agents, steps in (
        ("halfcheetah-medium-replay", 2, 12_000), ("hopper-medium-replay", 3, 9_000)) for name, more in (
        ("mabcq", ""), ("mabcq-independent", "--no-reweight"))],  # half an hour
    *[("dqn", f"dqn.py --env {env}") for env in DISCRETE],
    *[("rem-ensemble", f"rem.py --env {env} --ensemble") for env in DISCRETE],
    *[("rem", f"rem.py --env {env}") for env in DISCRETE],
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of every run")
    parser.add_argument("--only", help="run only the lines of the grid with this name")
    parser.add_argument("--env", help="run only the lines of the grid on this dataset")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the runs' folders go, from the repository's root")
    options = parser.parse_args()
    for name, line in GRID:
        script, *arguments = line.split()
        env = arguments[arguments.index("--env") + 1]
        if options.only not in (None, name) or options.env not in (None, env):
            continue
        run = HERE.parent / options.out / name / env / f"seed{options.seed}"
        if not (run / "result.json").exists():
            resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
            command = [sys.executable, str(HERE.parent / "algorithms" / script), *arguments, "--seed", str(options.seed),
                       "--out", str(options.out), *resume]
            if code := subprocess.run(command, cwd=HERE.parent).returncode:
                sys.exit(code)
        committed = HERE / name / env / f"seed{options.seed}.json"
        committed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "result.json", committed)
