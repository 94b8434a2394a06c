"""From the notations of a configuration to numbers per layer, and to the settings of one module."""

from __future__ import annotations

from dataclasses import dataclass

from mola.architecture.allocation import check_top_k, top_k_of_module
from mola.architecture.notation import (
    DEFAULT_NUM_EXPERTS,
    LARGEST_PLAIN_NUM_EXPERTS,
    default_num_experts,
    resolve_per_layer,
)
from mola.architecture.patterns import by_pattern
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.layer import ExpertSettings


@dataclass(frozen=True)
class PerLayer:
    """A configuration's numbers, with one entry per decoder layer."""

    num_experts: list[int]
    top_k: list[int]
    r: list[int]

    @classmethod
    def resolve(cls, config: MolaConfig, num_layers: int) -> PerLayer:
        """Resolve the notations for a model, and write the numbers into the configuration.

        The saved configuration holds these numbers, because a notation may name a file that does not exist later.

        Raises:
            MolaError: the notations do not fit the number of layers, or each other.
        """
        if config.has_default_num_experts and config.num_experts == DEFAULT_NUM_EXPERTS:
            config.num_experts = default_num_experts(num_layers)
        names = ("num_experts", "top_k", "r")
        numbers = cls(*(resolve_per_layer(getattr(config, name), num_layers, name) for name in names))
        check_top_k(numbers.num_experts, numbers.top_k)
        for name in names:
            values = getattr(numbers, name)
            is_same = len(set(values)) == 1 and (name != "num_experts" or values[0] <= LARGEST_PLAIN_NUM_EXPERTS)
            setattr(config, name, values[0] if is_same else values)
        return numbers

    def settings(self, config: MolaConfig, module: str, layer_index: int | None) -> ExpertSettings:
        """Settings of one adapted module; `layer_index` is None for a module outside the layers.

        Raises:
            MolaError: the module is outside the layers and the layers have different numbers, or `top_k` is above
                the module's number of experts.
        """
        num_layers = len(self.num_experts)
        if all(len(set(values)) == 1 for values in (self.num_experts, self.top_k, self.r)):
            layer_index = 0  # all layers have the same numbers, so the module's layer does not matter
        elif layer_index is None or layer_index >= num_layers:
            raise MolaError(
                f"`target_modules` matches {module!r}, which lies in none of the {num_layers} decoder "
                "layers, while `num_experts`, `top_k` or `r` differ from layer to layer. Leave it out with "
                "`exclude_modules`, train it in full with `modules_to_save`, or give one value for all layers."
            )
        num_experts = by_pattern(config.num_experts_pattern, module, self.num_experts[layer_index])
        return ExpertSettings(
            r=by_pattern(config.rank_pattern, module, self.r[layer_index]),
            num_experts=num_experts,
            top_k=top_k_of_module(num_experts, self.top_k[layer_index], module),
            lora_alpha=by_pattern(config.alpha_pattern, module, config.lora_alpha),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            router=config.router,
            router_jitter_noise=config.router_jitter_noise,
            init_lora_weights=config.init_lora_weights,
        )
