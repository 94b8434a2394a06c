"""mola: fine-tune language models with a mixture of LoRA experts whose number differs per layer.

Importing it registers the method with PEFT; after that `get_peft_model`, `PeftModel.from_pretrained`
and the other entry points of PEFT and Transformers know it.
"""

from mola._version import __version__
from mola.errors import MolaError
from mola.tuner import MolaConfig, MolaLinear, MolaModel

__all__ = ["MolaConfig", "MolaError", "MolaLinear", "MolaModel", "__version__"]
