"""The record of a run, `run.json`: what a reader needs to understand and repeat it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from mola.files.environment import machine_description, software_versions
from mola.training.data import TrainingData
from mola.training.fields import ADAPTER_DEFAULTS
from mola.training.model import recorded_quantization, training_changes
from mola.training.options import TrainOptions
from mola.training.skill import skill_settings


def describe_run(
    options: TrainOptions, config: PretrainedConfig, data: TrainingData, allocation: dict[str, Any]
) -> dict[str, Any]:
    """The record of a run that is about to begin: what a reader needs to understand and repeat the run."""
    return {
        "command": without_token(sys.argv, options.hub_token),
        "settings": options.to_dict(),
        "adapter_settings": adapter_settings(options),
        "effective_batch_size": options.effective_batch_size,
        "processes": options.world_size,
        "allocation": allocation,
        "quantization": recorded_quantization(options, config),
        "template": data.template,
        "data": {name: asdict(report) for name, report in data.reports.items()},
        "data_fingerprints": data.fingerprints,
        "versions": software_versions(),
        "machine": machine_description(options.device),
    }


def adapter_settings(options: TrainOptions) -> dict[str, Any]:
    """The settings of a new adapter; of an existing one, those that the run changes."""
    if options.adapter is not None:
        return training_changes(options)
    if options.skill is not None:
        return skill_settings(options)
    return {name: options.adapter_setting(name) for name in ADAPTER_DEFAULTS}


def without_token(command: Sequence[str], token: str | None) -> list[str]:
    """A command line without the Hub's token, for a record that others may read."""
    return [word.replace(token, "<HUB_TOKEN>") for word in command] if token else list(command)
