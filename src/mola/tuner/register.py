"""Makes PEFT know the method `MOLA`; PEFT itself accepts only names that its enum already has."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from mola.errors import MolaError

NAME = "mola"


def add_peft_type(name: str) -> PeftType:
    """Add a member to the `PeftType` enum, or return the one that is there.

    Enums cannot be subclassed once they have members, so the member is built by hand the way
    `enum` does it; every attribute below is read by one of Python 3.11 to 3.13.
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
    """Register the method with PEFT; a second call with the same classes does nothing."""
    peft_type = add_peft_type(NAME.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is config_cls:
        return
    if known is not None:
        raise MolaError(
            f"PEFT already has a method named {NAME.upper()!r} ({known.__module__}.{known.__qualname__}). "
            "Only one package can provide it: uninstall the other one."
        )
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls)
