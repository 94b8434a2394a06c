"""Random inputs for backends, and what tests ask of them."""

import torch
import torch.nn.functional as F

from mola.tuner.kernels.api import MixtureInputs, MixtureSettings

LEAVES = "x", "experts_A", "experts_B", "router", "base_output"


def make_inputs(
    shape,
    num_experts,
    dtype,
    *,
    r=3,
    out=7,
    top_k=2,
    fused=True,
    bias=False,
    dropout=False,
    x_dtype=None,
    params_dtype=None,
    scaling=1.7,
    seed=0,
):
    """Inputs whose tensors ask for gradients, but for the frozen base.

    Args:
        shape: of the input, `(..., in)`.
        num_experts: experts.
        dtype: of the products; the router is in float32 at least.
        r: rank.
        out: output features.
        top_k: experts per token.
        fused: with the weight of the base, else with its output.
        bias: with a bias of the base.
        dropout: with a mask of booleans.
        x_dtype: of the input and the base; that of the products by default.
        params_dtype: of A and B; that of the products by default.
        scaling: `lora_alpha / r`.
        seed: of all numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    x_dtype, params_dtype = x_dtype or dtype, params_dtype or dtype

    def draw(*size, dtype, fan_in=1):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) / fan_in**0.5).to(dtype)

    in_features = shape[-1]
    x = draw(*shape, dtype=x_dtype)
    experts_A = draw(num_experts, r, in_features, dtype=params_dtype, fan_in=in_features)
    experts_B = draw(num_experts, r, out, dtype=params_dtype, fan_in=r)
    router = draw(num_experts, in_features, dtype=torch.promote_types(torch.float32, dtype), fan_in=in_features)
    weight = draw(out, in_features, dtype=x_dtype, fan_in=in_features)
    of_base = draw(out, dtype=x_dtype) if bias else None
    mask = torch.rand(shape, generator=generator) > 0.3 if dropout else None
    result = None if fused else F.linear(x, weight, of_base)
    settings = MixtureSettings(top_k, scaling, dtype)
    base = (None, weight, of_base) if fused else (result, None, None)
    return as_leaves(MixtureInputs(x, *base, experts_A, experts_B, router, mask, settings))


def leaves(inputs):
    """Tensors that have gradients, in the order of `LEAVES`."""
    return [tensor for name in LEAVES if (tensor := getattr(inputs, name)) is not None]


def as_leaves(inputs):
    """The same numbers in leaves of their own, which ask for gradients."""
    changed = {name: getattr(inputs, name) for name in LEAVES}
    changed = {name: None if t is None else t.detach().requires_grad_() for name, t in changed.items()}
    return inputs._replace(**changed)


def in_float64(inputs):
    """The same numbers in float64, in leaves of their own: what the reference backend is given."""
    changed = {name: t.double() for name, t in inputs._asdict().items() if torch.is_tensor(t) and t.is_floating_point()}
    settings = inputs.settings._replace(dtype=torch.float64)
    return as_leaves(inputs._replace(**changed, settings=settings))
