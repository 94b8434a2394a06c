"""The training scripts' flags for Weights & Biases."""

import importlib.util
import logging
import os
from typing import Any

from mola.errors import MolaError
from mola.research_code.training_options import SharedOptions

logger = logging.getLogger(__name__)


_VALUES = {
    "wandb_watch": ("false", "gradients", "parameters", "all"),
    "wandb_log_model": ("false", "end", "checkpoint"),
}


def tracker_settings(options: SharedOptions) -> dict[str, Any]:
    """Options of `mola train`: Weights & Biases if a project is named, else none.

    Without the package it is a warning, since the run does not need it.

    Raises:
        MolaError: another flag of the tracker without a project, or with a value that it does not have.
    """
    project = _tracker_project(options)
    others = {
        name: getattr(options, name)
        for name in ("wandb_run_name", "wandb_watch", "wandb_log_model")
        if getattr(options, name)
    }
    if not project:
        if others:
            name = next(iter(others))
            raise MolaError(f"`{name}` ({others[name]!r}) needs a `wandb_project`. Name one, or leave it out.")
        return {"report_to": "none"}
    for name, known in _VALUES.items():
        if getattr(options, name) not in ("", *known):  # which the trainer's reporter would take for false
            raise MolaError(f"`{name}` must be one of {', '.join(known)}: got {getattr(options, name)!r}.")
    if not _has_wandb():
        logger.warning("`wandb_project` %s: the package wandb is not installed, nothing is reported there.", project)
        return {"report_to": "none"}
    return {"report_to": "wandb", "run_name": options.wandb_run_name or None}


def tracker_environment(options: SharedOptions) -> dict[str, str]:
    """Variables that the trainer's reporter reads and that have no option; none if nothing is reported."""
    project = _tracker_project(options)
    if not project or not _has_wandb():
        return {}
    variables = {
        "WANDB_PROJECT": project,
        "WANDB_WATCH": options.wandb_watch,
        "WANDB_LOG_MODEL": options.wandb_log_model,
    }
    return {name: value for name, value in variables.items() if value}


def _tracker_project(options: SharedOptions) -> str:
    return options.wandb_project or os.environ.get("WANDB_PROJECT", "")


def _has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None
