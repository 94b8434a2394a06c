"""`TrainOptions`: every option of `mola train`, on top of Transformers' `TrainingArguments`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from mola.data.encode import TRUNCATIONS
from mola.devices import DTYPES, resolve_device, resolve_dtype
from mola.errors import MolaError

# Defaults of the adapter; None on the command line, so that "given" and "default" can be told apart.
ADAPTER_DEFAULTS: dict[str, Any] = {
    "num_experts": "2468",
    "r": "8",
    "top_k": "2",
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "target_modules": None,
    "modules_to_save": None,
    "router_aux_loss_coef": 0.0,
    "router_aux_loss_reduction": "module",
    "router_z_loss_coef": 0.0,
    "router_jitter_noise": 0.0,
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainOptions(TrainingArguments):
    """Options of `mola train`: those below and every field of `transformers.TrainingArguments`.

    Raises:
        MolaError: a value is outside its range, or options contradict each other.
    """

    base_model: str | None = _option(None, "Folder or hub id of the base model.")
    adapter: str | None = _option(None, "Adapter to start from; its experts are trained on.")
    task: str | None = _option(None, "Name of a task, or a task file (YAML); not needed for prepared data.")
    data: str | None = _option(None, "Training data: a JSON, JSON lines, CSV or parquet file, or a saved dataset.")
    train_split: str = _option("train", "Split to train on where the data has several.")
    eval_data: str | None = _option(None, "Data to evaluate the loss on; default: the same as `data`.")
    eval_split: str = _option("validation", "Split to evaluate on; without one the run has no evaluation.")
    validation_size: float = _option(
        0.0, "Without a validation split: samples (or a share below 1) to take from the training data for it."
    )
    limit: int | None = _option(None, "Train on the first so many samples only.")
    eval_limit: int | None = _option(None, "Evaluate on the first so many samples only.")
    template: str | None = _option(None, "Prompt template; default: the task's own, else alpaca.")
    cutoff_len: int = _option(512, "Most tokens of a sample.")
    truncation: str = _option("error", "What to do with longer samples: error, drop, left or right.")
    train_on_inputs: bool = _option(False, "Train on the prompt's tokens as well.")
    add_eos_token: bool = _option(True, "End every sample with the end-of-sequence token.")

    num_experts: str | None = _option(
        None,
        "Experts per module: digits over equal groups of layers (2468), a shape, a list, a JSON file. "
        f"Default {ADAPTER_DEFAULTS['num_experts']}.",
    )
    r: str | None = _option(None, "Rank of each expert, one or a list. Default 8.")
    top_k: str | None = _option(None, "Experts used per token, one or a list. Default 2.")
    lora_alpha: float | None = _option(None, "The update is scaled by lora_alpha / r. Default 16.")
    lora_dropout: float | None = _option(None, "Dropout on the experts' input. Default 0.05.")
    target_modules: str | None = _option(
        None,
        "Linears to adapt: names separated by commas, or all-linear. Default: the seven of LLaMA, where they "
        "exist, else PEFT's choice for the architecture.",
    )
    modules_to_save: str | None = _option(None, "Modules to train in full, names separated by commas.")
    router_aux_loss_coef: float | None = _option(None, "Weight of the balance loss; default 0 = off.")
    router_aux_loss_reduction: str | None = _option(None, "Balance loss per 'module' (default) or per 'layer'.")
    router_z_loss_coef: float | None = _option(None, "Weight of the router z-loss; default 0 = off.")
    router_jitter_noise: float | None = _option(None, "Relative noise on the routers' input; default 0 = off.")

    dtype: str = _option("auto", "Number format of the frozen base: auto, float32, bfloat16 or float16.")
    overwrite_output_dir: bool = _option(False, "Replace an earlier run in the output folder.")
    trust_remote_code: bool = _option(False, "Run code shipped with the model.")

    # Other defaults than TrainingArguments.
    learning_rate: float = _option(3e-4, "Learning rate after warm-up.")
    warmup_steps: float = _option(0.1, "Steps of warm-up, or below 1 the share of all steps.")
    logging_steps: float = _option(10, "Log every so many steps, or below 1 this share of all steps.")
    logging_nan_inf_filter: bool = _option(False, "Hide NaN and infinite losses. Off: they stop the run.")
    eval_strategy: str = _option("epoch", "When to evaluate the loss: no, steps or epoch.")
    save_strategy: str = _option("epoch", "When to write checkpoints: no, steps, epoch or best.")
    save_total_limit: int | None = _option(3, "Checkpoints to keep, besides the best one.")
    load_best_model_at_end: bool = _option(True, "End with the checkpoint of the lowest evaluation loss.")

    def __post_init__(self) -> None:
        self._check_choices()
        device = resolve_device("cpu" if self.use_cpu else None)
        if device.type == "cpu":
            self.use_cpu = True
        torch_dtype, self.dtype_reason = resolve_dtype(self.dtype, device)
        if self.dtype == "auto" and (self.bf16 or self.fp16):
            torch_dtype = DTYPES["bfloat16" if self.bf16 else "float16"]
            self.dtype_reason = "as asked for with bf16 or fp16"
        self.base_dtype = str(torch_dtype).removeprefix("torch.")
        if not (self.bf16 or self.fp16):
            # Experts are kept in float32 and computed in the base's format: mixed precision.
            self.bf16 = self.base_dtype == "bfloat16"
            self.fp16 = self.base_dtype == "float16"
        super().__post_init__()
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}

    def _check_choices(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise MolaError(f"`truncation` must be one of {', '.join(TRUNCATIONS)}: got {self.truncation!r}.")
        if self.validation_size < 0:
            raise MolaError(f"`validation_size` must be at least 0: got {self.validation_size}.")
        if self.adapter is not None:
            given = [name for name in ADAPTER_DEFAULTS if getattr(self, name) is not None]
            if given:
                raise MolaError(
                    f"`adapter` brings its own {', '.join(f'`{name}`' for name in given)}: leave these options out, "
                    "or leave `adapter` out to start with new experts."
                )

    def adapter_setting(self, name: str) -> Any:
        """An option of the adapter, or its default."""
        value = getattr(self, name)
        return ADAPTER_DEFAULTS[name] if value is None else value


def split_names(names: str | None) -> list[str] | str | None:
    """Module names from a comma-separated option; "all-linear" and regular expressions stay one text."""
    if names is None or names == "all-linear":
        return names
    parts = [name.strip() for name in names.split(",")]
    return parts if all(re.fullmatch(r"[\w.]+", part) for part in parts) else names
