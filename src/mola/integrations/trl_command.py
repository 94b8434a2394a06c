"""TRL's commands with a mixture in place of LoRA: `python -m mola.integrations.trl_command sft --config recipe.yaml`.

These commands are TRL's own scripts with TRL's own flags. Rank, alpha, dropout, targets and modules to save are TRL's
`lora_*` flags. The other settings of a mixture are flags such as `mola_num_experts`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from typing import Any

from mola.errors import MolaError
from mola.integrations.mixture_settings import FIELDS, PREFIX, read_settings
from mola.tuner import MolaConfig

MixtureArguments = make_dataclass(
    "MixtureArguments",
    [
        (f"{PREFIX}{name}", str | None, field(default=None, metadata={"help": f"`{name}` of MolaConfig."}))
        for name in FIELDS
    ],
)


def mixture_config(model_args: Any, mixture: Any) -> MolaConfig:
    """The configuration that TRL's `ModelConfig` and `MixtureArguments` describe.

    Raises:
        MolaError: a value is wrong, or `use_dora` is set.
    """
    if model_args.use_dora:
        raise MolaError(f"`use_dora` does not work with a mixture, got {model_args.use_dora!r}. Leave it out.")
    return MolaConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=getattr(model_args, "lora_target_parameters", None),
        modules_to_save=model_args.lora_modules_to_save,
        task_type=model_args.lora_task_type,
        use_rslora=model_args.use_rslora,
        **read_settings(vars(mixture)),
    )


def main(arguments: Sequence[str]) -> None:
    """Run a TRL script.

    Args:
        arguments: the name of the script, such as sft, and its flags.

    Raises:
        MolaError: TRL is not installed or has no such script, or a setting of the mixture is wrong.
    """
    if importlib.util.find_spec("trl") is None:
        raise MolaError("TRL is not installed. Run: pip install 'mola-peft[trl]'")
    import trl

    name = arguments[0] if arguments else ""
    try:
        script: Any = importlib.import_module(f"trl.scripts.{name}")
        types = script.make_parser().dataclass_types
        if not any(hasattr(each, "lora_r") for each in types):
            raise ValueError("it trains no adapter")
    except (ImportError, ValueError, AttributeError) as error:
        raise MolaError(
            f"The first word must name a script of TRL that trains adapters, such as sft or dpo: got {name!r}."
        ) from error
    dataclasses: Any = (*types, MixtureArguments)
    parser = trl.TrlParser(dataclasses, prog=f"trl_command {name}")
    *parsed, mixture = parser.parse_args_and_config(args=list(arguments[1:]))
    config = mixture_config(next(each for each in parsed if hasattr(each, "lora_r")), mixture)
    # Scripts import `get_peft_config` at the top of their module or inside their function.
    modules: Any = (trl, script)
    for module in modules:
        if hasattr(module, "get_peft_config"):
            module.get_peft_config = lambda model_args: config
    script.main(*parsed)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MolaError as error:
        sys.exit(f"trl_command: error: {error}")
