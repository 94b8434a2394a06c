"""`mola_training.py` and `mola_training_instruction.py`: their flags become options of `mola train`.

The scripts print the equivalent `mola train` command. Messages name the options of `mola train`.
"""

import importlib.util
import logging
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mola.data.examples import load_examples
from mola.errors import MolaError
from mola.files.reading import read_json_object
from mola.options.fields import shown_name
from mola.training.checkpoints import RUN_FILE, STATE_FILE, find_checkpoint
from mola.training.fields import TrainFields
from mola.training.options import TrainOptions
from mola.training.run_folder import check_start_is_kept
from mola.training.train import main as train_main
from research_code.adapters import AdapterFlags, adapter_flags, process_count, usable_adapter
from research_code.training_options import (
    BALANCE_COEF,
    WARMUP_SHARE,
    WARMUP_STEPS,
    ResearchInstructionOptions,
    ResearchTrainOptions,
    SharedOptions,
)

__all__ = ["ResearchInstructionOptions", "ResearchTrainOptions", "main", "train_settings"]

logger = logging.getLogger("mola.research_code")  # a child of "mola", whose log lines are shown

_SAME_NAME = (
    "base_model",
    "output_dir",
    "learning_rate",
    "cutoff_len",
    "truncation",
    "train_on_inputs",
    "add_eos_token",
    "template",
    "seed",
    "dtype",
    "save_steps",
    "overwrite_output_dir",
    "trust_remote_code",
)
_TRACKER_FLAGS = ("wandb_run_name", "wandb_watch", "wandb_log_model")


def main(options: SharedOptions) -> int:
    """Train with the `mola train` options that the flags stand for."""
    tracker = tracker_environment(options)
    try:
        settings = train_settings(options, reports=bool(tracker))
        if os.environ.get("RANK", "0") == "0":
            processes = f", in {process_count()} processes," if process_count() > 1 else ""
            logger.info("The same%s as: %s", processes, _as_command(settings, tracker))
        os.environ.update(tracker)
        train_options = TrainOptions(**settings)
    except (ValueError, TypeError, ImportError) as error:  # raised by TrainingArguments
        raise MolaError(str(error)) from error
    return train_main(train_options)


def train_settings(options: SharedOptions, reports: bool) -> dict[str, Any]:
    """Options of `mola train` with the same effect as the flags; `reports`: whether to report to Weights & Biases."""
    accumulation = _accumulation(options)
    settings: dict[str, Any] = {name: getattr(options, name) for name in _SAME_NAME} | {
        "data": options.data_path,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": options.num_epochs,
        "warmup_steps": _warmup_steps(options, accumulation),
        "router_aux_loss_coef": BALANCE_COEF if options.obalance else 0.0,
        "router_aux_loss_reduction": "layer" if options.obalance else None,
        "lora_dropout": options.lora_dropout,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_total_limit": 3,
        "load_best_model_at_end": False,
        "eval_strategy": "no",
        "report_to": "wandb" if reports else "none",
        "run_name": (options.wandb_run_name or None) if reports else None,
    }
    if getattr(options, "load_in_8bit", False):
        settings["load_in_8bit"] = True
    if options.group_by_length:
        settings["train_sampling_strategy"] = "group_by_length"
    if options.val_set_size:
        evaluation = {"eval_strategy": "steps", "eval_steps": options.save_steps}
        settings |= {"validation_size": options.val_set_size, **evaluation}
    return settings | _experts(options)


def _as_command(settings: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """The `mola train` command with these options, for a POSIX shell."""
    shown = {each.name: shown_name(each) for each in fields(TrainFields)}
    flags = [f"--{shown.get(name, name)}={_flag_text(value)}" for name, value in settings.items() if value is not None]
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, shlex.join(["mola", "train", *flags])])


def _flag_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _accumulation(options: SharedOptions) -> int:
    """Number of micro-batches per optimiser step in each process."""
    processes = process_count()
    at_once = options.micro_batch_size * processes
    if at_once < 1 or options.batch_size < 1 or options.batch_size % at_once:
        times = f" times {processes} processes" if processes > 1 else ""
        raise MolaError(
            f"`batch_size` must be a multiple of `micro_batch_size`{times}: got {options.batch_size} and "
            f"{options.micro_batch_size}. Pass a different --batch_size or --micro_batch_size."
        )
    return options.batch_size // at_once


def _warmup_steps(options: SharedOptions, accumulation: int) -> float:
    """The research code's 100 steps, but at most a tenth of the run."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    available = len(load_examples(options.data_path, None, "train"))
    size = options.val_set_size
    rows = available - (math.ceil(available * size) if size < 1 else int(size))
    if rows < 1:
        raise MolaError(
            f"`val_set_size` must leave samples to train on: got {size:g}, {options.data_path!r} has {available}. "
            "Pass a smaller number, or 0 for no evaluation."
        )
    steps_per_epoch = math.ceil(math.ceil(rows / (options.micro_batch_size * process_count())) / accumulation)
    steps = math.ceil(options.num_epochs * steps_per_epoch)
    warmup = min(WARMUP_STEPS, int(WARMUP_SHARE * steps))
    if warmup < WARMUP_STEPS and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "Warm-up is %d of %d steps. The research code's %d steps would keep the learning rate low for most of the "
            "run. --warmup_steps sets a different number.",
            warmup,
            steps,
            WARMUP_STEPS,
        )
    return warmup


def tracker_environment(options: SharedOptions) -> dict[str, str]:
    """Environment variables for Weights & Biases; empty without a project or without the package.

    Raises:
        MolaError: a flag of the tracker is given without a project.
    """
    project = options.wandb_project or os.environ.get("WANDB_PROJECT", "")
    if not project:
        for name in _TRACKER_FLAGS:
            if getattr(options, name):
                raise MolaError(f"`{name}` ({getattr(options, name)!r}) needs a `wandb_project`.")
        return {}
    if importlib.util.find_spec("wandb") is None:
        logger.warning("`wandb_project` %s: the package wandb is not installed, so nothing is reported.", project)
        return {}
    variables = {"PROJECT": project, "WATCH": options.wandb_watch, "LOG_MODEL": options.wandb_log_model}
    return {f"WANDB_{name}": value for name, value in variables.items() if value}


def _experts(options: SharedOptions) -> dict[str, Any]:
    """Options for new experts, for an adapter's experts, or for the experts of an interrupted run."""
    flags = adapter_flags(options)
    start = (options.resume_from_checkpoint or "").strip()
    if start.lower() in ("", "none", "false", "no"):
        return _new_experts(flags)
    if start.lower() in ("last", "true") or (Path(start) / STATE_FILE).is_file():
        return _resumed_run(start, options, flags)
    if not Path(start).is_dir():
        raise MolaError(
            f"`resume_from_checkpoint` must be a checkpoint-N folder or the folder of an adapter: got {start!r}. "
            "Correct the path, or leave the flag out to train new experts."
        )
    check_start_is_kept(start, options.output_dir, "resume_from_checkpoint")
    adapter = usable_adapter(start, options.base_model, flags, options.trust_remote_code)
    method = read_json_object(Path(adapter) / "adapter_config.json").get("peft_type")
    if method != "MOLA":  # the scripts set the weight of the balance loss, which only a mixture has
        raise MolaError(
            f"`resume_from_checkpoint` must be an adapter of mola: {start!r} is of type {method}. Use `mola train "
            "--adapter` for it."
        )
    return {"adapter": adapter}


def _new_experts(flags: AdapterFlags) -> dict[str, Any]:
    return {
        "num_experts": flags.number_experts,
        "r": flags.lora_r,
        "top_k": flags.top_k,
        "lora_alpha": flags.lora_alpha,
        "target_modules": flags.lora_target_modules,
    }


def _resumed_run(start: str, options: SharedOptions, flags: AdapterFlags) -> dict[str, Any]:
    """Options that resume the run of the checkpoint `start`."""
    is_last = start.lower() in ("last", "true")
    if not is_last and (Path(start) / "pytorch_model.bin").is_file():
        raise MolaError(
            f"`resume_from_checkpoint` {start!r} is a checkpoint of the research code's trainer: it holds the whole "
            "model and no adapter. Pass the adapter folder that its run ended with."
        )
    resume: dict[str, Any] = {"resume_from_checkpoint": "last" if is_last else start}
    run = Path(options.output_dir) if is_last else Path(start).parent
    settings = read_json_object(run / RUN_FILE).get("settings")
    first_adapter = settings.get("adapter") if isinstance(settings, dict) else None
    if not first_adapter:
        return {**_new_experts(flags), **resume}
    # The checkpoint has the settings of the adapter that the run began with; that adapter may be missing by now.
    checkpoint = find_checkpoint(Path(options.output_dir), resume["resume_from_checkpoint"])
    usable_adapter(str(checkpoint), options.base_model, flags, options.trust_remote_code)
    return {"adapter": first_adapter, **resume}
