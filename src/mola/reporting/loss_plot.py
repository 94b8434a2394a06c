"""The loss curve of a run as a picture; needs matplotlib, the extra `plot`."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

from mola.files.atomic import atomic_write_bytes
from mola.files.reading import json_lines

PLOT_FILE = "loss.png"

Curve = list[tuple[int, float]]


def read_curves(metrics_file: Path) -> dict[str, Curve]:
    """Training and evaluation loss by step.

    Args:
        metrics_file: the `metrics.jsonl` of a run.

    Returns:
        Curves by name, `training` and `evaluation`; those without a value are left out.
    """
    entries = list(json_lines(metrics_file))
    curves = {
        label: [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
        for label, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    return {label: curve for label, curve in curves.items() if curve}


def plot_losses(curves: dict[str, Curve], target: Path) -> bool:
    """Draw the curves into a PNG file, in one step.

    Args:
        curves: as from `read_curves`.
        target: the file.

    Returns:
        Whether it was drawn: not without matplotlib, nor without a curve.
    """
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
