"""make demo: a method of the notes beside a clone and the data, in demo/.

Builds hopper-medium-replay, the replay buffer of a robot that learns to hop: most episodes are bad,
a few are good. Trains on it, side by side, a clone (bc.py) and IQL (iql.py). Draws what they earn.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # lets this file find common.py
from common import SUITE, load_dataset
from style import CLONE, DATA, POLICY, plt, words

ROOT = Path(__file__).resolve().parent.parent
ENV = "hopper-medium-replay"
CLONE_RUN = ["bc.py", "--steps", "30000", "--eval-every", "3000"]
# larger rates than the paper's, for a short run: Q grows as fast as the target networks follow it
METHOD_RUN = ["iql.py", "--steps", "12000", "--eval-every", "2000", "--actor-lr", "1e-3",
              "--critic-lr", "1e-3", "--target-rate", "0.02"]
NAME = "IQL"
NEXT = "algorithms/td3_bc.py --env hopper-medium-replay --steps 100000"


def start(arguments: list[str]) -> subprocess.Popen:
    script = str(ROOT / "algorithms" / arguments[0])
    command = [sys.executable, script, "--env", ENV, "--threads", "1", "--final-episodes", "50",
               "--out", str(ROOT / "demo"), *arguments[1:]]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def result_of(arguments: list[str]) -> dict:
    path = ROOT / "demo" / arguments[0].removesuffix(".py") / ENV / "seed0" / "result.json"
    return json.loads(path.read_text())


def main() -> int:
    load_dataset(ENV, "cpu")  # builds it, before two processes ask for it
    runs = [start(CLONE_RUN), start(METHOD_RUN)]
    try:
        failed = any([run.wait() for run in runs])
    except KeyboardInterrupt:  # it reached both, too: they save and leave
        failed = any([run.wait() for run in runs])
    if failed:
        return 1
    clone, method = result_of(CLONE_RUN), result_of(METHOD_RUN)
    _, low, high = SUITE["hopper"]
    data = 100 * (clone["dataset"]["return_mean"] - low) / (high - low)

    figure, axis = plt.subplots(figsize=(8, 4.5))
    last = clone["steps"]
    for result, name, color in ((clone, "a clone", CLONE), (method, NAME, POLICY)):
        steps = [point["step"] for point in result["curve"]]
        axis.plot(steps, [point["score"] for point in result["curve"]], "o-", color=color)
        axis.text(steps[-1] + last / 40, result["score"], f"{name}: {result['score']:.0f}",
                  color=words(color))
    axis.axhline(data, color=DATA, linestyle="--")
    axis.text(last * 1.03, data - 6, f"the data: {data:.0f}", color=words(DATA))
    axis.set(xlabel="updates", ylabel="score", title=ENV, xlim=(0, last * 1.35))
    figure.savefig(ROOT / "demo" / "learning_curve.png")

    folder = f"demo/{METHOD_RUN[0].removesuffix('.py')}/{ENV}/seed0"
    print(f"\n{ENV}: score of the final policy, mean of 50 episodes")
    print(f"  the data   {data:7.1f}")
    print(f"  a clone    {clone['score']:7.1f}   {clone['steps']:,} updates of bc.py")
    print(f"  {NAME:<11}{method['score']:7.1f}   {method['steps']:,} updates of {METHOD_RUN[0]}")
    print("picture: demo/learning_curve.png")
    print(f"policy:  {folder}/policy.pt; play it: .venv/bin/python results/play.py {folder}")
    print(f"next:    .venv/bin/python {NEXT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
