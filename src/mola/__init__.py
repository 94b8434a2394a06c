"""mola: fine-tune language models with a mixture of LoRA experts whose number differs per layer.

Importing mola registers the method with PEFT; after that `get_peft_model`, `PeftModel.from_pretrained`
and the other entry points of PEFT and Transformers support mixtures. The `mola` command imports only what it needs.
"""
# ruff: noqa: F403, F405

from typing import TYPE_CHECKING

from mola import _process
from mola._version import __version__
from mola.errors import MolaError

_IS_COMMAND = _process.is_mola_command()
if _IS_COMMAND:
    _process.set_up_command()  # before anything imports torch

__all__ = [
    "ContinualOptions",
    "ContinualResult",
    "EvaluateOptions",
    "EvaluateResult",
    "GenerateOptions",
    "LossResult",
    "MolaConfig",
    "MolaError",
    "MolaLinear",
    "MolaModel",
    "PlanOptions",
    "Skills",
    "TrainOptions",
    "TrainResult",
    "__version__",
    "continual",
    "evaluate",
    "generate_text",
    "kernels_report",
    "load_model",
    "load_tokenizer",
    "plan",
    "train",
]

if TYPE_CHECKING:
    from mola._names import *
else:
    if not _IS_COMMAND:
        from mola.tuner import MolaConfig, MolaLinear, MolaModel  # registers the method

    def __getattr__(name):
        """Import the remaining names when one is first used: a program that only loads an adapter needs no trainer."""
        if name not in __all__:
            raise AttributeError(f"module 'mola' has no attribute {name!r}")
        from mola import _names

        globals().update({each: getattr(_names, each) for each in __all__ if hasattr(_names, each)})
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__})
