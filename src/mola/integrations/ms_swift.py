"""Plug-in for ms-swift: `swift sft --external_plugins <this file> --tuner_type mola`; see docs/guides/ms-swift.md.

ms-swift runs this file by its path while it checks its arguments. It rejects unknown arguments, so the settings of a
mixture are in `model_kwargs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import swift
from peft import PeftConfig, PeftModel, get_peft_model
from swift.arguments import ExportArguments
from swift.arguments.tuner_args import TunerArguments
from swift.tuner_plugin import PeftTuner, tuners_map
from swift.utils import json_parse_to_dict

from mola.errors import MolaError
from mola.integrations.mixture_settings import (
    PREFIX,
    check_unused_fields,
    check_version,
    continue_mixture,
    has_router_losses,
    is_mixture,
    raise_not_mergeable,
    read_settings,
    require_router_losses,
)
from mola.tuner import MolaConfig

_LORA = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_bias",
    "init_weights",
    "modules_to_save",
    "lora_dtype",
    "use_rslora",
)
_TARGETS = ("target_modules", "target_regex", "freeze_llm", "freeze_vit", "freeze_aligner")
_TRIED = {
    "rlhf_type": (),
    "task_type": ("causal_lm",),
    "tuner_backend": ("peft",),
    "optimizer": ("default",),
    "init_weights": ("true", "false"),
    "lora_dtype": ("float32",),
}
_EXPORTS = ("merge_lora", "quant_method", "to_ollama", "to_mcore", "to_hf")


class MolaTuner(PeftTuner):
    """The tuner type `mola`."""

    settings: dict[str, Any] = {}  # noqa: RUF012 # for this process, which trains once

    @staticmethod
    def prepare_model(args: Any, model: Any) -> PeftModel:
        """Create a new mixture from ms-swift's LoRA fields and mola's settings."""
        from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules

        config = MolaConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            bias=args.lora_bias,
            use_rslora=args.use_rslora,
            init_lora_weights=args.init_weights,
            target_modules=get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model) or None,
            task_type="CAUSAL_LM",
            **MolaTuner.settings,
        )
        return require_router_losses(get_peft_model(model, config))

    @staticmethod
    def save_pretrained(
        model: Any, save_directory: str, state_dict: Any = None, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Save like PEFT, with the weights that the trainer has gathered from its shards."""
        kwargs["selected_adapters"] = ["default"]
        model.save_pretrained(save_directory, state_dict=state_dict, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model: Any, model_id: str, is_trainable: bool = False, **kwargs: Any) -> PeftModel:
        """Load a saved mixture, for training or inference."""
        if is_trainable:
            return continue_mixture(model, model_id, MolaTuner.settings, **kwargs)
        return PeftModel.from_pretrained(model, model_id, **kwargs)


def _check_training(args: Any) -> None:
    """Check the arguments for a mixture before anything is loaded, and set the arguments that router losses need."""
    MolaTuner.settings = read_settings(args.model_kwargs)
    check_unused_fields("ms-swift", args, TunerArguments, (*_LORA, *_TARGETS))
    for name, tried in _TRIED.items():
        value = getattr(args, name, None)
        if value is not None and str(value).lower() not in tried:
            raise MolaError(f"`{name}` must be {' or '.join(tried) or 'left out'} for a mixture, got {value!r}.")
    if args.use_swift_lora or args.use_galore:
        raise MolaError("`use_swift_lora` and `use_galore` do not work with a mixture: leave them out.")
    folder = _first_adapter(args)  # training continues from this adapter, with its router losses
    own = vars(PeftConfig.from_pretrained(folder)) if folder else {}
    if has_router_losses({**own, **MolaTuner.settings}):
        checkpointing = args.gradient_checkpointing_kwargs = json_parse_to_dict(args.gradient_checkpointing_kwargs)
        if checkpointing.setdefault("use_reentrant", False) or args.use_logits_to_keep:
            raise MolaError(
                "Router losses need `gradient_checkpointing_kwargs` with `use_reentrant` false, and "
                "`use_logits_to_keep` false, which hides tokens that contribute to the loss from them: leave both out."
            )
        args.use_logits_to_keep = False


def _first_adapter(args: Any) -> str | None:
    return args.resume_from_checkpoint or next(iter(args.adapters), None)


def _refuse_mola_settings_without_mola(args: Any) -> None:
    """Refuse mola's settings under a different `tuner_type`.

    ms-swift would ignore the settings and silently train its default, a LoRA.
    """
    given = [name for name in args.model_kwargs if name.lower().startswith(PREFIX)]
    if given:
        raise MolaError(f"{given} in `model_kwargs` need `tuner_type: mola`, got {args.tuner_type!r}.")
    folder = _first_adapter(args)
    if is_mixture(folder):
        raise MolaError(f"{folder!r} is a mixture: set `tuner_type: mola` to train it, got {args.tuner_type!r}.")


def _check_tuner(args: Any) -> None:
    (_check_training if args.tuner_type == "mola" else _refuse_mola_settings_without_mola)(args)


def _check_export(args: Any) -> None:
    given = [f"`{name}`" for name in _EXPORTS if args.tuner_type == "mola" and getattr(args, name)]
    if given:
        raise_not_mergeable(", ".join(given))


def _checked(method: Callable, check: Callable[[Any], None]) -> Callable:
    @functools.wraps(method)
    def run(self: Any) -> None:
        check(self)
        method(self)

    return run


check_version("ms-swift", swift.__version__, "4.6")
tuners_map["mola"] = MolaTuner
TunerArguments.__post_init__ = _checked(TunerArguments.__post_init__, _check_tuner)
ExportArguments._init_output_dir = _checked(ExportArguments._init_output_dir, _check_export)
