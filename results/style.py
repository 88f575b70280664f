"""One palette and one type size for every picture of the repository.

The same colour means the same thing everywhere: the data grey, a clone light blue, the true value
black, an estimate red, the learned policy blue, a second method orange. Words in the three light
colours are a shade darker, or nobody could read them on a phone.
"""
import matplotlib

matplotlib.use("Agg")  # draws into files; needs no screen
import matplotlib.pyplot as plt

DATA = "#8c8c8c"
CLONE = "#7fc4e8"
TRUTH = "#000000"
ESTIMATE = "#d62728"
POLICY = "#1f5fbf"
SECOND = "#f08a24"
DARKER = {DATA: "#666666", CLONE: "#2478a6", SECOND: "#b35900"}

plt.rcParams.update({
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
})


def words(color: str) -> str:
    """The colour of words about what is drawn in `color`."""
    return DARKER.get(color, color)
