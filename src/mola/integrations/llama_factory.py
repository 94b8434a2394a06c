"""Program that trains mixtures with LLaMA-Factory: `python -m mola.integrations.llama_factory train recipe.yaml`.

LLaMA-Factory has no plug-ins. This program adds `finetuning_type: mola` to LLaMA-Factory in its own process and then
runs its command line. For the rest of LLaMA-Factory, the mixture is `lora`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from typing import Any, Literal

from llamafactory import launcher
from llamafactory.extras.env import VERSION
from llamafactory.extras.misc import is_env_enabled
from llamafactory.hparams import parser
from llamafactory.hparams.finetuning_args import FinetuningArguments, LoraArguments
from llamafactory.model import adapter
from peft import PeftConfig, PeftModel

from mola.errors import MolaError
from mola.integrations.mixture_settings import (
    FIELDS,
    PREFIX,
    check_unused_fields,
    check_version,
    continue_mixture,
    continued_config,
    has_router_losses,
    raise_not_mergeable,
    read_settings,
    require_router_losses,
)
from mola.tuner import MolaConfig

_COMMANDS = ("train", "chat", "api", "webchat", "export", "env", "version", "help")
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora")
_UNSUPPORTED_TRAINING = ("use_llama_pro", "use_mca", "use_hyper_parallel", "use_muon", "use_asft_loss")
_UNSUPPORTED_MODELS = ("use_unsloth", "use_unsloth_gc", "use_kt", "mixture_of_depths")
_STAGES = ("pt", "sft")


def _check_arguments(self: Any) -> None:
    self.is_mixture = self.finetuning_type == "mola"
    given = {f"{PREFIX}{name}": getattr(self, f"{PREFIX}{name}") for name in FIELDS}
    self.mixture_settings = read_settings(given)
    if self.mixture_settings and not self.is_mixture:
        raise MolaError(f"{[f'{PREFIX}{name}' for name in self.mixture_settings]} need `finetuning_type: mola`.")
    if self.is_mixture:
        check_unused_fields("LLaMA-Factory", self, LoraArguments, _LORA)
        for name in _UNSUPPORTED_TRAINING:
            if getattr(self, name):
                raise MolaError(f"`{name}` does not work with a mixture: leave it out.")
        if self.stage not in _STAGES:
            raise MolaError(f"`stage` must be one of {list(_STAGES)} for a mixture, got {self.stage!r}.")
        self.finetuning_type = "lora"
    FinetuningArguments.__post_init__(self)


MixtureArguments = make_dataclass(
    "MixtureArguments",
    [
        ("finetuning_type", Literal["lora", "oft", "freeze", "full", "mola"], "lora"),
        *((f"{PREFIX}{name}", str | None, None) for name in FIELDS),
    ],
    bases=(FinetuningArguments,),
    namespace={"__post_init__": _check_arguments},
)


def _set_up(
    original: Callable, config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool, cast: bool
) -> Any:
    """Replace `_setup_lora_tuning`; call the `original` function for everything that is not a mixture."""
    folders = model_args.adapter_name_or_path or []
    init_kwargs = {
        "subfolder": model_args.adapter_folder,
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.hf_hub_token,
    }
    are_mixtures = [PeftConfig.from_pretrained(folder, **init_kwargs).peft_type == "MOLA" for folder in folders]
    if not (getattr(finetuning_args, "is_mixture", False) or any(are_mixtures)):
        return original(config, model, model_args, finetuning_args, is_trainable, cast)
    _check_settings(model_args, finetuning_args, folders, are_mixtures, is_trainable)
    # LLaMA-Factory sometimes makes arguments of its own class, which have no such attribute.
    settings = getattr(finetuning_args, "mixture_settings", {})
    if folders and not is_trainable:
        asked = continued_config(model, folders[0], settings, PREFIX, **init_kwargs)
        return PeftModel.from_pretrained(model, folders[0], config=asked, **init_kwargs)
    adapter.logger.info_rank0("Fine-tuning method: a mixture of LoRA experts (mola)")
    if folders:
        model = continue_mixture(model, folders[0], settings, **init_kwargs)
        for parameter in model.parameters():
            if cast and parameter.requires_grad:  # copies of `modules_to_save`, which PEFT does not cast
                parameter.data = parameter.data.float()
    else:
        with _config_of_mixture(settings):
            model = original(config, model, model_args, finetuning_args, is_trainable, cast)
        require_router_losses(model)
    base, checkpointing = model.get_base_model(), not model_args.disable_gradient_checkpointing
    if has_router_losses(vars(model.peft_config["default"])) and checkpointing and base.supports_gradient_checkpointing:
        adapter.logger.info_rank0("Router losses: gradient checkpointing is not re-entrant.")
        _set_gradient_checkpointing(base)
    return model


def _set_gradient_checkpointing(base: Any) -> None:
    """Enable non-re-entrant gradient checkpointing, and make it the default when the trainer enables it again."""
    enable, default = base.gradient_checkpointing_enable, {"use_reentrant": False}
    base.gradient_checkpointing_enable = lambda gradient_checkpointing_kwargs=None, **more: enable(
        gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or default, **more
    )
    base.gradient_checkpointing_enable()


def _check_settings(
    model_args: Any, finetuning_args: Any, folders: list, are_mixtures: list[bool], is_trainable: bool
) -> None:
    for name in _UNSUPPORTED_MODELS:
        if getattr(model_args, name):
            raise MolaError(f"`{name}` does not work with a mixture: leave it out.")
    if model_args.export_dir is not None:
        raise_not_mergeable("`export_dir`")
    if len(folders) > 1 or not all(are_mixtures):
        raise MolaError(f"`adapter_name_or_path` must be one mixture: got {folders}, which would have to be merged.")
    if finetuning_args.create_new_adapter:
        raise MolaError("`create_new_adapter` would merge the mixture into the base model: leave it out.")
    if is_trainable and not finetuning_args.is_mixture:
        raise MolaError(f"{folders[0]!r} is a mixture: set `finetuning_type: mola` to train it.")
    if not is_trainable and not folders:
        raise MolaError("`finetuning_type: mola` needs `adapter_name_or_path` for inference.")


@contextlib.contextmanager
def _config_of_mixture(settings: dict[str, Any]) -> Iterator[None]:
    """Make LLaMA-Factory build a `MolaConfig` instead of a `LoraConfig`, from the same arguments."""

    def make(use_rslora: bool, use_dora: bool, modules_to_save: Any, **lora: Any) -> MolaConfig:
        saved = modules_to_save and list(modules_to_save)
        return MolaConfig(use_rslora=use_rslora, modules_to_save=saved, **lora, **settings)

    before, adapter.LoraConfig = adapter.LoraConfig, make
    try:
        yield
    finally:
        adapter.LoraConfig = before


def register() -> None:
    """Make `finetuning_type: mola` known to LLaMA-Factory in this process."""
    check_version("LLaMA-Factory", VERSION, "0.9.5")
    for group in (parser._TRAIN_ARGS, parser._INFER_ARGS, parser._EVAL_ARGS):
        group[group.index(FinetuningArguments)] = MixtureArguments
    original = adapter._setup_lora_tuning
    adapter._setup_lora_tuning = lambda *args, **kwargs: _set_up(original, *args, **kwargs)


def main() -> int:
    """Run a command of LLaMA-Factory; in processes of torchrun, train."""
    in_torchrun = "LOCAL_RANK" in os.environ
    try:
        command = sys.argv[1] if len(sys.argv) > 1 else "help"
        if command not in _COMMANDS and not in_torchrun:
            raise MolaError(
                f"The command {command!r} does not work with mixtures. These commands do: {list(_COMMANDS)}."
            )
        for name in ("USE_V1", "USE_RAY", "USE_MCA"):
            if is_env_enabled(name):
                raise MolaError(f"The environment variable {name} selects code without mixtures: unset it.")
        register()
        if not in_torchrun:
            launcher.__file__ = __file__  # the program that it starts again for several devices
            launcher.launch()
        else:
            from llamafactory.train.tuner import run_exp

            sys.argv[1:2] = [] if command == "train" else sys.argv[1:2]
            run_exp()
    except MolaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
