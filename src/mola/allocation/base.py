"""The base model of an allocation: its depth and its linears, from the configuration alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mola.architecture.allocation import LinearShape, plan_allocation
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.targets import linear_shapes, resolve_target_modules
from mola.models.base_model import load_config
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.options.fields import names_between_commas


@dataclass(frozen=True)
class Base:
    """What an allocation needs to know of a model."""

    name: str  # folder or hub id
    num_layers: int  # decoder layers
    linears: tuple[LinearShape, ...]  # the linears to adapt; none where a probe says which
    layer_of: Mapping[str, int | None]  # from the name of any module to its layer, None outside the layers
    trust_remote_code: bool = False  # run code shipped with the model
    gguf_file: str | None = None  # GGUF file in the folder, if it is one

    @property
    def is_adapted(self) -> list[bool]:
        """Of every layer, whether it has a linear to adapt."""
        return self.has_some(linear.layer_index for linear in self.linears)

    def has_some(self, layers: Iterable[int | None]) -> list[bool]:
        """Of every layer, whether it is among some."""
        chosen = set(layers)
        return [index in chosen for index in range(self.num_layers)]


def read_base(
    base_model: str,
    target_modules: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    *,
    has_probe: bool = False,
) -> Base:
    """Read a model's depth and the linears to adapt, as `mola train` chooses them; loads no weights.

    With `has_probe` linears are left out: an adapter says which are adapted, and not every architecture has a default.

    Raises:
        MolaError: the model has no readable configuration, or `target_modules` does not fit it.
    """
    load_config(base_model, trust_remote_code, gguf_file)
    model = model_on_meta(base_model, trust_remote_code, gguf_file)
    num_layers = count_decoder_layers(model, base_model)
    stacks = LayerStacks.of(model)
    linears: list[LinearShape] = []
    if not has_probe:
        targets = resolve_target_modules(model, stacks, names_between_commas(target_modules))
        linears = linear_shapes(model, *targets)
        ones = [1] * num_layers
        plan_allocation(linears, ones, ones, ones)  # refuses linears outside the layers
    layer_of = {name: stacks.index(name) for name, _ in model.named_modules()}
    return Base(base_model, num_layers, tuple(linears), layer_of, trust_remote_code, gguf_file)
