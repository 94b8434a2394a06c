"""A layer with other experts than its own, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from mola.tuner.layer import ExpertSettings, MolaLinear


class Experts(NamedTuple):
    """The weights of an adapter in one layer, with what they are.

    Attributes:
        A: `(E, r, in)`.
        B: `(E, r, out)`.
        router: `(E, in)`; None for one expert without any.
        settings: of these experts.
    """

    A: nn.Parameter
    B: nn.Parameter
    router: nn.Parameter | None
    settings: ExpertSettings


@contextmanager
def replaced_experts(layer: MolaLinear, name: str, experts: Experts) -> Iterator[None]:
    """Compute with these in the place of an adapter's own, until the context ends."""
    own = Experts(layer.mola_A[name], layer.mola_B[name], layer.mola_router.get(name), layer.settings[name])
    try:
        _put(layer, name, experts)
        yield
    finally:
        _put(layer, name, own)


def _put(layer: MolaLinear, name: str, experts: Experts) -> None:
    layer.mola_A[name], layer.mola_B[name] = experts.A, experts.B
    if experts.router is not None:
        layer.mola_router[name] = experts.router
    elif name in layer.mola_router:
        del layer.mola_router[name]
    layer.set_settings(name, experts.settings)
