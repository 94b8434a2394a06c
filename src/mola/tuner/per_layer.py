"""From the numbers of a configuration, layer by layer and by name of module, to the settings of one module."""

from __future__ import annotations

from dataclasses import dataclass

from mola.architecture.allocation import check_top_k, top_k_of_module
from mola.architecture.notation import LARGEST_PLAIN_NUM_EXPERTS, resolve_per_layer
from mola.architecture.patterns import by_pattern
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.layer import ExpertSettings


@dataclass(frozen=True)
class PerLayer:
    """Numbers with one entry per decoder layer."""

    num_experts: list[int]
    top_k: list[int]
    r: list[int]

    @classmethod
    def resolved(cls, config: MolaConfig, num_layers: int) -> PerLayer:
        """Those of a configuration, which from here on holds the numbers themselves.

        Raises:
            MolaError: they do not fit the number of layers, or each other.
        """
        names = ("num_experts", "top_k", "r")
        lists = cls(*(resolve_per_layer(getattr(config, name), num_layers, name) for name in names))
        check_top_k(lists.num_experts, lists.top_k)
        # A notation may be a file that is gone tomorrow.
        for name in names:
            values = getattr(lists, name)
            is_plain = len(set(values)) == 1 and (name != "num_experts" or values[0] <= LARGEST_PLAIN_NUM_EXPERTS)
            setattr(config, name, values[0] if is_plain else values)
        return lists

    def settings(self, config: MolaConfig, key: str, index: int | None) -> ExpertSettings:
        """Settings of the module `key` in the layer `index`, None if it lies in none.

        Raises:
            MolaError: it lies in no layer, while the layers differ; or `top_k` does not fit its experts.
        """
        num_layers = len(self.num_experts)
        if all(len(set(values)) == 1 for values in (self.num_experts, self.top_k, self.r)):
            position = 0
        elif index is None or index >= num_layers:
            raise MolaError(
                f"`target_modules` matches {key!r}, which lies in none of the {num_layers} decoder "
                "layers, while `num_experts`, `top_k` or `r` differ from layer to layer. Leave it out with "
                "`exclude_modules`, train it in full with `modules_to_save`, or give one value for all layers."
            )
        else:
            position = index
        num_experts = by_pattern(config.num_experts_pattern, key, self.num_experts[position])
        return ExpertSettings(
            r=by_pattern(config.rank_pattern, key, self.r[position]),
            num_experts=num_experts,
            top_k=top_k_of_module(num_experts, self.top_k[position], key),
            lora_alpha=by_pattern(config.alpha_pattern, key, config.lora_alpha),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            router=config.router,
            router_jitter_noise=config.router_jitter_noise,
            init_lora_weights=config.init_lora_weights,
        )
