"""The PEFT method: configuration, layer, model. Importing it registers the method with PEFT."""

from mola.tuner.register import add_peft_type, register

add_peft_type("MOLA")

from mola.tuner.config import MolaConfig  # noqa: E402
from mola.tuner.layer import MolaLinear  # noqa: E402
from mola.tuner.model import MolaModel  # noqa: E402

register(MolaConfig, MolaModel)

__all__ = ["MolaConfig", "MolaLinear", "MolaModel"]
