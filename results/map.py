"""figures/map.png: the notes on one page. From the problem over the remedies to the files."""
from pathlib import Path

from style import CLONE, DATA, ESTIMATE, POLICY, plt

ROWS = [  # heading of the notes, the remedy in one line, the files
    ("Offline RL vs. IL", "imitate the data", "bc"),
    ("Distributional Shift", "nothing: see it fail", "sac   dqn"),
    ("Policy Constraints", "stay near the data's policy",
     "bcq bear brac plas td3_bc rebrac"),
    ("weighted cloning", "imitate the better actions more", "awr   crr   awac   iql"),
    ("Model-Based", "learn a model, distrust it off the data", "mopo   morel   combo"),
    ("Value Function Reg.", "make Q pessimistic", "cql   cql_discrete   combo"),
    ("Uncertainty-Based", "ask several Qs, trust the least", "edac   msg   rem   uwac"),
    ("SOTA1: DT", "ask a sequence model for a return", "decision_transformer"),
    ("offline MARL", "several agents, each alone", "mabcq"),
    ("off-policy evaluation", "judge a policy without playing it", "fqe   algae_dice"),
]


def box(axis, x: float, y: float, width: float, height: float, text: str, color: str, **style):
    patch = plt.Rectangle((x, y), width, height, facecolor=color, alpha=0.18, edgecolor=color)
    axis.add_patch(patch)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", **style)


def main() -> None:
    figure, axis = plt.subplots(figsize=(9, 6.6))
    top = len(ROWS)
    box(axis, 0, top + 0.25, 10, 0.9,
        "A fixed batch of data. Q is asked about actions that nobody tried,\n"
        "errs upwards there, and no new data correct it.", ESTIMATE, fontweight="bold")
    for row, (heading, remedy, files) in enumerate(ROWS):
        y = top - 1 - row
        box(axis, 0, y + 0.1, 2.3, 0.8, heading, DATA, fontsize=11)
        box(axis, 2.5, y + 0.1, 3.5, 0.8, remedy, CLONE, fontsize=11)
        box(axis, 6.2, y + 0.1, 3.8, 0.8, files, POLICY, fontsize=10, family="monospace")
    axis.set(xlim=(-0.05, 10.05), ylim=(-0.05, top + 1.3))
    axis.axis("off")
    figure.savefig(Path(__file__).resolve().parent / "figures" / "map.png")


if __name__ == "__main__":
    main()
