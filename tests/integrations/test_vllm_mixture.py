"""What a mixture adds to a linear of vLLM is what `MolaLinear` adds: fused, sliced, compiled. Needs no vLLM."""

import pytest
import torch
from torch import nn

from mola.errors import MolaError
from mola.integrations.vllm_server.mixture import FusedMixture
from mola.integrations.vllm_server.parts import Part, PartSettings, Shard, shards_of, slice_inputs, slice_outputs
from mola.tuner.layer import ExpertSettings, MolaLinear

IN, TOKENS = 24, 7
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.04}


def layer_of(num_experts=3, top_k=2, r=4, outputs=16, inputs=IN, dtype=torch.float32, alpha=9.0):
    layer = MolaLinear(nn.Linear(inputs, outputs, dtype=dtype), "default", ExpertSettings(r, num_experts, top_k, alpha))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    for kind in (layer.mola_A, layer.mola_B):
        kind["default"].data = kind["default"].data.to(dtype)
    return layer.eval().requires_grad_(False)


def part_of(layer, start=0):
    own = layer.settings["default"]
    router = layer.mola_router["default"] if own.num_experts > 1 else None
    settings = PartSettings(own.num_experts, own.r, own.top_k, own.scaling, own.router)
    return Part(settings, layer.mola_A["default"], layer.mola_B["default"], router, start)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 2), (8, 2)])
@pytest.mark.parametrize("shape", [(1,), (2, 3)])
@pytest.mark.parametrize("products", ["in its dtype", "in float32", "by a function"])
def test_one_linear_is_that_of_mola(num_experts, top_k, shape, dtype, products):
    layer, x = layer_of(num_experts, top_k, dtype=dtype), torch.randn(*shape, IN).to(dtype)
    linear = (lambda matrix: lambda rows: rows @ matrix.t()) if products == "by a function" else None
    inner = torch.float32 if products == "in float32" else dtype
    output = FusedMixture([part_of(layer)], inner, linear=linear)(x, layer.base_layer(x))
    torch.testing.assert_close(output, layer(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not torch.equal(output, layer.base_layer(x))


SHAPES = {
    "of one shape": [{}, {"outputs": 8}, {"outputs": 8}],
    "of other shapes": [{"num_experts": 5}, {"r": 2, "outputs": 8}, {"num_experts": 1, "top_k": 1, "alpha": 1.0}],
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("left_out", [None, 1])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_fused_linears_keep_a_router_each(shapes, left_out, tokens):
    layers, x = [layer_of(**shape) for shape in SHAPES[shapes]], torch.randn(tokens, IN)
    starts = [sum(layer.out_features for layer in layers[:number]) for number in range(len(layers))]
    parts = [part_of(*pair) for number, pair in enumerate(zip(layers, starts, strict=True)) if number != left_out]
    base = torch.cat([layer.base_layer(x) for layer in layers], dim=1)
    expected = [layer.base_layer(x) if number == left_out else layer(x) for number, layer in enumerate(layers)]
    output = FusedMixture(parts[::-1], torch.float32)(x, base)  # in any order
    torch.testing.assert_close(output, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_equal_logits_choose_as_mola():
    layer, x = layer_of(num_experts=5, top_k=2), torch.randn(TOKENS, IN)
    layer.mola_router["default"][1:] = layer.mola_router["default"][0]
    output = FusedMixture([part_of(layer)], torch.float32)(x, layer.base_layer(x))
    torch.testing.assert_close(output, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_experts", "ranks"), [(1, 2), (4, 3)])
def test_slices_of_the_input_add_up(ranks, num_experts):
    """As in a row-parallel linear: logits are summed over ranks, outputs later."""
    layer, x = layer_of(num_experts, top_k=min(num_experts, 2)), torch.randn(TOKENS, IN)
    size = IN // ranks
    parts = [slice_inputs(part_of(layer), rank, ranks, "down_proj", size) for rank in range(ranks)]
    seen = []

    def outputs(reduce):
        slices = zip(parts, x.split(size, 1), strict=True)
        return [
            FusedMixture([part], torch.float32, "cpu", reduce)(rows, torch.zeros(TOKENS, 16)) for part, rows in slices
        ]

    outputs(lambda logits: seen.append(logits) or logits)
    assert len(seen) == (ranks if num_experts > 1 else 0)  # one expert has no router to ask
    total = sum(outputs(lambda logits: sum(seen)))
    torch.testing.assert_close(total + layer.base_layer(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("is_fused", [False, True])
def test_slices_of_the_output_lie_side_by_side(ranks, is_fused):
    """Four heads of queries and two of keys and of values, which four ranks share in pairs; or one linear for all."""
    head, heads, x = 6, (4, 2, 2), torch.randn(TOKENS, IN)
    copies = max(1, ranks // 2)
    whole = [count * head for count in heads]
    layers = [layer_of(outputs=sum(whole))] if is_fused else [layer_of(outputs=size) for size in whole]
    updates = torch.cat([layer(x) - layer.base_layer(x) for layer in layers], dim=1).split(whole, dim=1)
    sizes = [heads[0] * head // ranks, *(max(1, heads[1] // ranks) * head,) * 2]
    for rank in range(ranks):
        shards = shards_of(sizes, rank, ranks, (1, copies, copies))
        of_each = [shards] if is_fused else [[shard] for shard in shards]
        parts = [slice_outputs(part_of(layer), own, "qkv") for layer, own in zip(layers, of_each, strict=True)]
        output = FusedMixture(parts, torch.float32)(x, torch.zeros(TOKENS, sum(sizes)))
        ranks_of = (rank, rank // copies, rank // copies)
        expected = [
            update[:, number * size : (number + 1) * size]
            for update, size, number in zip(updates, sizes, ranks_of, strict=True)
        ]
        torch.testing.assert_close(output, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_other_sizes_are_refused():
    part = part_of(layer_of())
    with pytest.raises(MolaError, match="experts of 'up' have 16 outputs, vLLM.s linear has 32"):
        slice_outputs(part, [Shard(16, 0, 0, 2)], "up")
    with pytest.raises(MolaError, match=f"experts of 'down' have {IN} inputs, vLLM's linear has 26"):
        slice_inputs(part, 0, 2, "down", 13)


@pytest.mark.parametrize("shapes", SHAPES)
def test_a_compiler_gets_one_graph_for_all_lengths(shapes):
    layers = [layer_of(**shape) for shape in SHAPES[shapes]]
    starts = [sum(layer.out_features for layer in layers[:number]) for number in range(len(layers))]
    mixture = FusedMixture([part_of(*pair) for pair in zip(layers, starts, strict=True)], torch.float32)
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (5, 40):
            x, base = torch.randn(tokens, IN), torch.randn(tokens, sum(layer.out_features for layer in layers))
            torch.testing.assert_close(compiled(x, base.clone()), mixture(x, base.clone()), rtol=1e-5, atol=1e-5)


def test_weights_are_in_no_checkpoint():
    mixture = FusedMixture([part_of(layer_of())], torch.float32)
    assert not mixture.state_dict()
    assert not list(mixture.parameters())
