"""The record of a run: what was asked for, on which data, with which software and machine."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import Trainer

from mola.files.atomic import atomic_write_json
from mola.files.environment import machine_description, software_versions
from mola.training.checkpoints import RUN_FILE
from mola.training.data import TrainingData
from mola.training.hub import without_token
from mola.training.options import ADAPTER_DEFAULTS, TrainOptions
from mola.training.schedule import effective_batch_size
from mola.training.setup import recorded_quantization, training_changes


def describe_run(options: TrainOptions, data: TrainingData, allocation: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to know, and to repeat, a run that is about to begin."""
    return {
        "command": without_token(sys.argv, options.hub_token),
        "settings": options.to_dict(),
        "adapter_settings": training_changes(options)
        if options.adapter
        else {name: options.adapter_setting(name) for name in ADAPTER_DEFAULTS},
        "effective_batch_size": effective_batch_size(options),
        "processes": options.world_size,
        "allocation": allocation,
        "quantization": recorded_quantization(options),
        "template": data.template,
        "data": {name: asdict(report) for name, report in data.reports.items()},
        "data_fingerprints": data.fingerprints,
        "versions": software_versions(),
        "machine": machine_description(options.device),
    }


def write_record(trainer: Trainer, folder: Path, record: dict[str, Any]) -> None:
    """Write it into the run folder, in the main process."""
    if trainer.is_world_process_zero():
        atomic_write_json(folder / RUN_FILE, record)
