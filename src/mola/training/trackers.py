"""`report_to`: which trackers there are, and whether their packages are installed."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from mola.errors import MolaError

_EXTRAS = {"tensorboard": "tracking", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Sequence[str]) -> None:
    """Whether a run can report to these trackers.

    Args:
        names: as in `report_to`, without `all` and `none`.

    Raises:
        MolaError: a name that the trainer does not know, or a tracker whose package is not installed.
    """
    available = get_available_reporting_integrations()
    unknown = [name for name in names if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        raise MolaError(
            f"`report_to` must name trackers, all or none: {', '.join(unknown)} is no tracker. There are "
            f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}; installed are {', '.join(available) or 'none'}."
        )
    missing = [name for name in names if name not in available]
    if missing:
        extra = _EXTRAS.get(missing[0])
        cure = f"Install it with pip install 'mola-peft[{extra}]'" if extra else "Install its package"
        raise MolaError(
            f"`report_to` must name installed trackers: {', '.join(missing)} is not; installed are "
            f"{', '.join(available) or 'none'}. {cure}, or pass --report_to none."
        )
