"""The PEFT method: configuration, layer and model. Importing this package registers the method with PEFT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.layer import MolaLinear
from mola.tuner.model import MolaModel

__all__ = ["MolaConfig", "MolaLinear", "MolaModel"]


def add_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum `PeftType`, or return the member that exists.

    PEFT accepts only methods in this enum. An enum with members cannot be subclassed, so this function builds the
    member like `enum`; Python 3.11 to 3.13 together read every attribute that it sets.
    """
    if name in PeftType._member_map_:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register the method `MOLA` with PEFT; a second call with the same classes does nothing.

    Raises:
        MolaError: a different package has registered a method of this name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(add_peft_type("MOLA"))
    if known is None:
        register_peft_method(name="mola", config_cls=config_cls, model_cls=model_cls)
    elif known is not config_cls:
        raise MolaError(
            f"PEFT already has a method named 'MOLA' ({known.__module__}.{known.__qualname__}). "
            "Only one package can provide it: uninstall the other one."
        )


register(MolaConfig, MolaModel)
