"""make demo: the data's mean, a clone of it and TD3+BC on hopper-medium, side by side, and their curves in demo/."""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"BC": ("bc.py", "--steps", "10000", "--eval-every", "2000"),
        "TD3+BC": ("td3_bc.py", "--steps", "20000", "--eval-every", "2000")}

if __name__ == "__main__":
    results = {}
    for name, (script, *arguments) in RUNS.items():
        command = [sys.executable, str(ROOT / "algorithms" / script), "--env", "hopper-medium", "--final-episodes", "50",
                   "--out", str(ROOT / "demo"), *arguments]
        if code := subprocess.run(command).returncode:
            sys.exit(code)
        path = ROOT / "demo" / script.removesuffix(".py") / "hopper-medium" / "seed0" / "result.json"
        results[name] = json.loads(path.read_text())
    low, high = -20.272305, 3234.3
    data = 100 * (results["BC"]["dataset"]["return_mean"] - low) / (high - low)
    plt.figure(figsize=(7, 4))
    plt.axhline(data, color="black", linestyle="--", linewidth=0.8, label="the data's mean")
    for name, result in results.items():
        plt.plot([point["step"] for point in result["curve"]], [point["score"] for point in result["curve"]], label=name)
    plt.xlabel("updates")
    plt.ylabel("D4RL-normalised score, 10 episodes")
    plt.title("hopper-medium")
    plt.legend()
    plt.tight_layout()
    plt.savefig(ROOT / "demo" / "learning_curve.png", dpi=120)
    print(f"\nhopper-medium, D4RL-normalised scores\n  the data's mean {data:7.1f}")
    for name, result in results.items():
        print(f"  {name:<15} {result['score']:7.1f}   after {result['steps']:,} updates, mean of 50 episodes")
    print("Both are short runs; the README's table has longer ones.\nLearning curve: demo/learning_curve.png")
