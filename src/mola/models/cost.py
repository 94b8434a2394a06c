"""What an allocation of experts costs for a model, without its weights."""

from __future__ import annotations

from dataclasses import replace

from mola.models.meta import count_decoder_layers, model_on_meta
from mola.options.fields import names_between_commas
from mola.tuner.allocation import AllocationPlan, plan_allocation, resolve_per_layer
from mola.tuner.layer_stacks import LayerStacks
from mola.tuner.targets import linear_shapes, resolve_target_modules


def cost_of_allocation(
    base_model: str,
    num_experts: str,
    top_k: str,
    r: str,
    target_modules: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> AllocationPlan:
    """Cost of an allocation for a model, without its weights. The arguments are options of `mola plan`.

    Returns:
        The plan with `base_parameters` filled in; formulas in `plan_allocation`.

    Raises:
        MolaError: the model's configuration cannot be read, or an option does not fit the model.
    """
    model = model_on_meta(base_model, trust_remote_code, gguf_file)
    num_layers = count_decoder_layers(model, base_model)
    targets = names_between_commas(target_modules)
    result = plan_allocation(
        linear_shapes(model, *resolve_target_modules(model, LayerStacks.of(model), targets)),
        resolve_per_layer(num_experts, num_layers, "num_experts"),
        resolve_per_layer(top_k, num_layers, "top_k"),
        resolve_per_layer(r, num_layers, "r"),
    )
    # `parameters()` yields a tied embedding once.
    return replace(result, base_parameters=sum(parameter.numel() for parameter in model.parameters()))
