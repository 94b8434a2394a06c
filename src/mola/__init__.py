"""mola: fine-tune language models with a mixture of LoRA experts whose number differs per layer.

Importing it registers the method with PEFT; after that `get_peft_model`, `PeftModel.from_pretrained`
and the other entry points of PEFT and Transformers know it.
"""

from mola import _threads as _threads  # first: it has to run before torch is imported
from mola._version import __version__
from mola.errors import MolaError
from mola.tuner import MolaConfig, MolaLinear, MolaModel

from mola.evaluate import EvaluateOptions, EvaluateResult, evaluate  # isort: skip
from mola.generate import GenerateOptions, generate_text  # isort: skip
from mola.loading import load_model, load_tokenizer  # isort: skip
from mola.plan import PlanOptions, plan  # isort: skip
from mola.train import TrainOptions, TrainResult, train  # isort: skip

__all__ = [
    "EvaluateOptions",
    "EvaluateResult",
    "GenerateOptions",
    "MolaConfig",
    "MolaError",
    "MolaLinear",
    "MolaModel",
    "PlanOptions",
    "TrainOptions",
    "TrainResult",
    "__version__",
    "evaluate",
    "generate_text",
    "load_model",
    "load_tokenizer",
    "plan",
    "train",
]
