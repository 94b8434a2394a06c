"""The loss curve of a run as a picture; needs matplotlib, the extra `plot`."""

import io
from importlib.util import find_spec
from pathlib import Path

from mola.files.atomic import atomic_write_bytes

PLOT_FILE = "loss.png"


def plot_losses(curves: dict[str, list[tuple[int, float]]], target: Path) -> bool:
    """Draw the curves into a PNG file, in one step; whether it was: not without matplotlib, nor without a curve."""
    if not curves or find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # no pyplot: that would choose a window system for the whole process

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for label, curve in curves.items():
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, marker="o" if len(curve) < 30 else None, markersize=3, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    atomic_write_bytes(target, picture.getvalue())
    return True
