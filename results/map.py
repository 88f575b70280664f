"""figures/map.png: the notes on one page. From the problem over the remedies to the files."""
from pathlib import Path

from style import CLONE, ESTIMATE, POLICY, plt

ROWS = [  # heading of the notes, the remedy in one line, the files
    ("Offline RL vs. IL", "imitate the data", "bc"),
    ("Distributional Shift", "no remedy: see it fail", "sac  dqn"),
    ("Policy Constraints", "stay near the data's policy", "bcq  bear  brac\nplas  td3_bc  rebrac"),
    ("Weighted cloning", "imitate the better actions more", "awr  crr  awac  iql"),
    ("Model-Based", "learn a model, distrust it off the data", "mopo  morel  combo"),
    ("Value Function Regularization", "make Q pessimistic", "cql  cql_discrete\ncombo"),
    ("Uncertainty-Based", "ask many Qs: the smallest, or a mixture", "edac  msg\nrem  uwac"),
    ("SOTA1: Decision Transformer", "ask a sequence model for a return", "decision_transformer"),
    ("Offline MARL", "several agents, each alone", "mabcq"),
    ("References", "judge unplayed policies; learn by duality", "fqe  algae_dice"),
]


def box(axis, x: float, y: float, width: float, height: float, color: str) -> None:
    patch = plt.Rectangle((x, y), width, height, facecolor=color, alpha=0.18, edgecolor=color)
    axis.add_patch(patch)


def main() -> None:
    figure, axis = plt.subplots(figsize=(6, 7.2))  # narrow, so that a phone shows it legibly
    top = len(ROWS)
    middle = {"ha": "center", "va": "center"}
    box(axis, 0, top + 0.2, 10, 1.0, ESTIMATE)
    axis.text(5, top + 0.7, "A fixed batch of data. Q is asked about actions\n"
              "that nobody tried, errs upwards there,\nand no new data correct it.", **middle)
    for row, (heading, remedy, files) in enumerate(ROWS):
        y = top - 1 - row
        box(axis, 0, y + 0.08, 5.7, 0.84, CLONE)
        axis.text(2.85, y + 0.69, heading, fontweight="bold", **middle)
        axis.text(2.85, y + 0.31, remedy, fontsize=11, **middle)
        box(axis, 5.9, y + 0.08, 4.1, 0.84, POLICY)
        axis.text(7.95, y + 0.5, files, family="monospace", **middle)
    axis.set(xlim=(-0.05, 10.05), ylim=(-0.05, top + 1.25))
    axis.axis("off")
    figure.savefig(Path(__file__).resolve().parent / "figures" / "map.png")


if __name__ == "__main__":
    main()
