"""The research code's two training scripts: their flags, turned into the options of `mola train`.

Flags keep their names and their effective defaults. Where a flag did something else than it said, it does here what
it says; where a default could not work on every model or run, the log says what is used instead.
"""

import logging
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.data.examples import load_examples
from mola.errors import MolaError
from mola.files.reading import read_json_object
from mola.research_code.adapters import lists_of, process_count, usable_adapter
from mola.research_code.flag_names import flag_names
from mola.research_code.trackers import tracker_environment, tracker_settings
from mola.research_code.training_options import (
    BALANCE_COEF,
    WARMUP_SHARE,
    WARMUP_STEPS,
    ResearchInstructionOptions,
    ResearchTrainOptions,
    SharedOptions,
)
from mola.training.checkpoints import RUN_FILE, STATE_FILE, find_checkpoint
from mola.training.options import TrainOptions
from mola.training.run_folder import check_start_is_kept
from mola.training.train import main as train_main

__all__ = ["ResearchInstructionOptions", "ResearchTrainOptions", "as_command", "main", "train_settings"]

logger = logging.getLogger(__name__)

_NONE = ("", "none", "false", "no")
_SAME_OPTIONS = (
    *("learning_rate", "cutoff_len", "truncation", "train_on_inputs", "add_eos_token"),
    *("template", "seed", "dtype"),
)
# What `mola train` calls otherwise; its other options have no flag here, or the same name.
_FLAGS = {
    "adapter": "resume_from_checkpoint",
    "data": "data_path",
    "num_experts": "number_experts",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "validation_size": "val_set_size",
}
_PHRASES = {
    r" --gradient_accumulation_steps \d+": "",  # which follows from `batch_size`
    r"--(adapter|activation_checkpointing|per_device_eval_batch_size|save_total_limit)\b(?!=)": r"`mola train --\1`",
    # The scripts have no other data, schedule or weight than these.
    r"`(train_)?split` must be one of": "`data_path` must have the split `train`, not only",
    r"`router_aux_loss_coef` \(e\.g\. 1e-3\)": "`obalance`",
    r"--(load_in_4bit or --load_in_8bit)": r"`mola train` with --\1",
    r", let it decay with `lr_scheduler_type` [^)]*\),": "",
    r"evaluate more often with `load_best_model_at_end`": "save and evaluate more often with `save_steps`",
    "Name the task, or prepare": "Prepare",
    "or pass the task that has prepared the rows": "or train with `mola train --task`",
}
# Weights of the whole model under the names of the running program; no adapter configuration beside them.
_WHOLE_MODEL = "pytorch_model.bin"


def train_settings(options: SharedOptions) -> dict[str, Any]:
    """Options of `mola train` that do what these flags say; contradictions are refused."""
    _check_numbers(options)
    accumulation = _accumulation(options)
    settings: dict[str, Any] = {
        "base_model": options.base_model,
        "data": options.data_path,
        "output_dir": options.output_dir,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": options.num_epochs,
        **{name: getattr(options, name) for name in _SAME_OPTIONS},
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "load_best_model_at_end": False,
        "overwrite_output_dir": options.overwrite_output_dir,
        "trust_remote_code": options.trust_remote_code,
    }
    if getattr(options, "load_in_8bit", False):
        settings["load_in_8bit"] = True
    if options.group_by_length:
        settings["train_sampling_strategy"] = "group_by_length"
    if options.val_set_size:
        settings |= {
            "validation_size": options.val_set_size,
            "eval_strategy": "steps",
            "eval_steps": options.save_steps,
        }
    else:
        settings["eval_strategy"] = "no"
    settings |= tracker_settings(options) | _experts(options)
    settings["warmup_steps"] = _warmup(options, accumulation)
    return settings


def main(options: SharedOptions) -> int:
    """Check the flags, show the same as a `mola train` command, train."""
    with flag_names(_FLAGS | {"template": options.template_flag}, _PHRASES):
        settings = train_settings(options)
        environment = tracker_environment(options)
        if os.environ.get("RANK", "0") == "0":
            where = f", in {process_count()} processes," if process_count() > 1 else ""
            logger.info("The same%s as: %s", where, as_command(settings, environment))
        os.environ.update(environment)
        try:
            train_options = TrainOptions(**settings)
        except (ValueError, TypeError, ImportError) as error:  # TrainingArguments' own checks, beside ours
            raise MolaError(str(error)) from error
        return train_main(train_options)


def as_command(settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> str:
    """The `mola train` command with these options, for a POSIX shell; `environment` are variables to set for it."""
    flags = [f"--{name}={_flag_text(value)}" for name, value in settings.items() if value is not None]
    variables = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    return " ".join([*variables, shlex.join(["mola", "train", *flags])])


def _flag_text(value: Any) -> str:
    """As it can be read back without a loss."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def _check_numbers(options: SharedOptions) -> None:
    """What is computed with before `TrainOptions` sees it."""
    size, epochs = options.val_set_size, options.num_epochs
    if options.save_steps < 1:
        raise MolaError(f"`save_steps` must be at least 1: got {options.save_steps}.")
    if not math.isfinite(size) or size < 0 or (size > 1 and size % 1):
        raise MolaError(
            f"`val_set_size` must be a number of samples or a share below 1: got {size}. Pass 0 for no evaluation."
        )
    if not math.isfinite(epochs) or epochs <= 0:
        raise MolaError(f"`num_epochs` must be a number above 0: got {epochs}. Pass --num_epochs 1 for one pass.")


def _accumulation(options: SharedOptions) -> int:
    """Micro-batches per step and process."""
    for name in ("batch_size", "micro_batch_size"):
        if getattr(options, name) < 1:
            raise MolaError(f"`{name}` must be at least 1: got {getattr(options, name)}.")
    processes = process_count()
    at_once = options.micro_batch_size * processes
    if options.batch_size % at_once:
        near = max(1, round(options.batch_size / at_once)) * at_once
        times = f" times {processes} processes" if processes > 1 else ""
        raise MolaError(
            f"`batch_size` must be a multiple of `micro_batch_size`{times}: got {options.batch_size} and "
            f"{options.micro_batch_size}. Pass --batch_size {near}, or a smaller --micro_batch_size."
        )
    return options.batch_size // at_once


def _warmup(options: SharedOptions, accumulation: int) -> float:
    """The research code's 100 steps, or less where they would be most of the run."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    there = len(load_examples(options.data_path, None, "train"))
    size = options.val_set_size
    rows = there - (math.ceil(there * size) if size < 1 else int(size))
    if rows < 1:
        raise MolaError(
            f"`val_set_size` must leave samples to train on: got {size:g}, {options.data_path!r} has {there}. "
            "Pass a smaller number, or 0 for no evaluation."
        )
    per_epoch = math.ceil(math.ceil(rows / (options.micro_batch_size * process_count())) / accumulation)
    steps = math.ceil(options.num_epochs * per_epoch)
    warmup = min(WARMUP_STEPS, int(WARMUP_SHARE * steps))
    if warmup < WARMUP_STEPS and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "Warm-up is %d of %d steps; the research code's %d would keep the learning rate low for most of the run. "
            "--warmup_steps chooses another number.",
            warmup,
            steps,
            WARMUP_STEPS,
        )
    return warmup


def _experts(options: SharedOptions) -> dict[str, Any]:
    """New experts, those of an adapter, or those of an interrupted run."""
    balance = {
        "router_aux_loss_coef": BALANCE_COEF if options.obalance else 0.0,
        "router_aux_loss_reduction": "layer" if options.obalance else None,
    }
    lists = lists_of(options)
    start = (options.resume_from_checkpoint or "").strip()
    resume: dict[str, Any] = {}
    if start.lower() not in _NONE:
        resume = _resumed_run(start, options)
        if not resume:
            check_start_is_kept(start, options.output_dir, "resume_from_checkpoint")
            adapter = usable_adapter(start, options.base_model, lists, options.trust_remote_code)
            method = read_json_object(Path(adapter) / "adapter_config.json").get("peft_type")
            if method != "MOLA":  # the scripts set what only a mixture has, such as the weight of the balance loss
                raise MolaError(
                    f"`resume_from_checkpoint` must be an adapter of mola here: {start!r} is of type {method}. "
                    "--adapter goes on with it."
                )
            return {"adapter": adapter, "lora_dropout": options.lora_dropout, **balance}
        if "adapter" in resume:
            # The lists are those of the checkpoint; the adapter that the run began from may be gone.
            checkpoint = find_checkpoint(Path(options.output_dir), resume["resume_from_checkpoint"])
            usable_adapter(str(checkpoint), options.base_model, lists, options.trust_remote_code)
            return {"lora_dropout": options.lora_dropout, **balance, **resume}
    return {
        "num_experts": lists.number_experts,
        "r": lists.lora_r,
        "top_k": lists.top_k,
        "lora_alpha": lists.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": lists.lora_target_modules,
        **balance,
        **resume,
    }


def _resumed_run(start: str, options: SharedOptions) -> dict[str, Any]:
    """Options that go on with a run; empty if `start` is an adapter and no checkpoint of a run."""
    path = Path(start)
    if start.lower() in ("last", "true"):
        return {"resume_from_checkpoint": "last", **_adapter_of_run(Path(options.output_dir))}
    if (path / STATE_FILE).is_file() and (path / _WHOLE_MODEL).is_file():
        raise MolaError(
            f"`resume_from_checkpoint` {start!r} is a checkpoint of the research code's trainer: it holds the whole "
            "model and no adapter. Pass the adapter folder that its run ended with."
        )
    if (path / STATE_FILE).is_file():
        return {"resume_from_checkpoint": start, **_adapter_of_run(path.parent)}
    if path.is_file():
        raise MolaError(f"`resume_from_checkpoint` must be a folder: {start!r} is a file. Pass the one it lies in.")
    if not path.is_dir():
        raise MolaError(
            f"`resume_from_checkpoint` must be a checkpoint-N folder or the folder of an adapter: {start!r} does not "
            "exist. Correct the path, or leave the flag out to train new experts."
        )
    return {}


def _adapter_of_run(folder: Path) -> dict[str, Any]:
    """The adapter that the run in `folder` started from, if it did."""
    settings = read_json_object(folder / RUN_FILE).get("settings")
    adapter = settings.get("adapter") if isinstance(settings, dict) else None
    return {"adapter": adapter} if adapter else {}
