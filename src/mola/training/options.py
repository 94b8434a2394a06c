"""`TrainOptions`: every option of `mola train`, on top of Transformers' `TrainingArguments`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from mola._compat import share_checkpointing
from mola.errors import MolaError
from mola.models.devices import DTYPES, resolve_device, resolve_dtype
from mola.models.quantization import check_mixed_precision, check_quantization
from mola.training.distributed import settle_deepspeed
from mola.training.fields import ADAPTER_DEFAULTS, LOGGING_STEPS, SAVE_TOTAL_LIMIT, TrainFields
from mola.training.option_checks import (
    check_launcher,
    check_trainer_options,
    check_trainer_values,
    settle_schedule,
)


@dataclass
class TrainOptions(TrainFields, TrainingArguments):
    """Options of `mola train`: those of `TrainFields` and every field of `transformers.TrainingArguments`.

    Raises:
        MolaError: a value is outside its range, or options contradict each other.
    """

    def __post_init__(self) -> None:
        self.settle()
        self.logs_by_length = self.logging_steps is None
        if self.logs_by_length:
            self.logging_steps = LOGGING_STEPS
        self.keeps_one = self.save_total_limit is None
        if self.keeps_one:
            self.save_total_limit = SAVE_TOTAL_LIMIT
        check_trainer_values(self)
        settle_schedule(self)
        device = self._settle_device()
        self._settle_dtype(device)
        check_launcher(self)
        if self.tf32 is None and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            self.tf32 = False  # Transformers would switch it on: speed must not round the routers' logits
        if str(self.fsdp).lower() in ("true", "false"):  # a text on the command line and in a recipe
            self.fsdp: Any = str(self.fsdp).lower() == "true"
        if isinstance(self.report_to, str) and "," in self.report_to:
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        settle_deepspeed(self, device)
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise MolaError(f"an option that takes a mapping needs it as JSON, got {error.doc!r}: {error}.") from error
        except (ValueError, OSError) as error:  # checks of Transformers, and files that it reads
            raise MolaError(str(error)) from error
        check_trainer_options(self)
        self.num_gpus = self.n_gpu
        self._n_gpu = min(self.n_gpu, 1)  # with more the Trainer would use nn.DataParallel and multiply the batch
        share_checkpointing(self)
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name and its alias
            if getattr(self, name, None) and getattr(self, f"{name}_kwargs", None) is None:
                setattr(self, f"{name}_kwargs", {"use_reentrant": False})

    def _settle_device(self) -> torch.device:
        """Set `use_cpu`, which says the same as `train_device` and is recorded."""
        given, self.train_device = self.train_device, None
        device = resolve_device(given or ("cpu" if self.use_cpu else None))
        best = resolve_device().type
        if device.index or device.type not in ("cpu", best):
            choices = " or ".join(dict.fromkeys(("cpu", best)))
            raise MolaError(
                f"`train_device` must be {choices}: got {given!r}. CUDA_VISIBLE_DEVICES chooses one of several GPUs."
            )
        if self.use_cpu and device.type != "cpu":
            raise MolaError(f"`train_device` {given} contradicts `use_cpu`. Leave one of them out.")
        self.use_cpu = device.type == "cpu"
        return device

    def _settle_dtype(self, device: torch.device) -> None:
        """Set `base_dtype`, the format of the base model, and mixed precision in the same format."""
        dtype, self.dtype_reason = resolve_dtype(self.dtype, device)
        if self.dtype == "auto" and (self.bf16 or self.fp16):
            dtype = DTYPES["bfloat16" if self.bf16 else "float16"]
            self.dtype_reason = "bfloat16, because of `bf16`" if self.bf16 else "float16, because of `fp16`"
        self.base_dtype = str(dtype).removeprefix("torch.")
        if not (self.bf16 or self.fp16):
            self.bf16 = self.base_dtype == "bfloat16"
            self.fp16 = self.base_dtype == "float16"
        if self.fp16 and device.type == "cpu":
            raise MolaError(
                "`dtype` float16 (or `fp16`) cannot be trained on a CPU: its gradients underflow. "
                "Pass --dtype bfloat16 or float32."
            )
        check_quantization(self, device, dtype)
        check_mixed_precision(self, self.mixed_dtype)

    @property
    def mixed_dtype(self) -> torch.dtype | None:
        """Dtype of mixed precision, or None without it."""
        return DTYPES["bfloat16"] if self.bf16 else DTYPES["float16"] if self.fp16 else None

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimiser step over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def to_dict(self) -> dict[str, Any]:
        """All options, for records and trackers; secrets are masked."""
        # Transformers masks every name that ends in `_token`, also that of this option.
        return {**super().to_dict(), "add_eos_token": self.add_eos_token}

    def adapter_setting(self, name: str) -> Any:
        """The value of an option of the adapter, or its default."""
        value = getattr(self, name)
        return ADAPTER_DEFAULTS[name] if value is None else value
