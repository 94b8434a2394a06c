"""The loss curve of a run as a picture; needs matplotlib, the extra `plot`."""

import importlib
import io
import logging
from pathlib import Path

from mola.files.atomic import atomic_write_bytes

logger = logging.getLogger(__name__)

PLOT_FILE = "loss.png"


def why_no_matplotlib() -> str | None:
    """What is wrong with matplotlib; None if it can draw."""
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        if error.name == "matplotlib":
            return "it is not installed"
        return str(error)
    except (ImportError, AttributeError) as error:  # made for another numpy
        logger.warning("matplotlib cannot be used: %s", error)
        return str(error)
    return None


def plot_losses(curves: dict[str, list[tuple[int, float]]], target: Path) -> bool:
    """Draw the curves into a PNG file, in one step; whether it was: not without matplotlib, nor without a curve."""
    if not curves or why_no_matplotlib() is not None:
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
