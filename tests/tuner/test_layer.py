"""The layer against a plain loop over experts, in values and gradients, and what it costs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mola import MolaLinear
from mola.tuner.kernels.cpu import decode as cpu_decode
from mola.tuner.layer import ExpertSettings
from mola.tuner.routing import ROUTERS, dense_gates, router_logits
from tests.grids import slow

from .counting import CountOperators
from .test_routing import sigmoid_router

GRID = [(1, 1), (5, 2), (5, 5), *slow((2, 1), (2, 2), (5, 1))]
TOLERANCES = [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 2e-2)]


def make(num_experts=3, top_k=2, r=4, inner=16, outer=24, bias=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    settings = ExpertSettings(r, num_experts, top_k, 16.0, init_lora_weights=False, **options)
    layer = MolaLinear(nn.Linear(inner, outer, bias=bias).to(dtype), "default", settings)
    return (layer.double() if dtype == torch.float64 else layer).requires_grad_()


def loop_over_experts(layer, x):
    """The formula of the paper, token by token and expert by expert."""
    settings = layer.settings["default"]
    tokens = x.reshape(-1, x.shape[-1])
    updates = []
    for token in tokens:
        if settings.num_experts == 1:
            gates = {0: 1.0}
        else:
            p = router_logits(token, layer.mola_router["default"])[0].softmax(-1)
            chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: settings.top_k]
            gates = {e: p[e] / p[chosen].sum() for e in chosen}
        update = 0
        for e, gate in gates.items():
            hidden = layer.mola_A["default"][e] @ token.to(layer.mola_A["default"].dtype)
            update = update + gate * settings.scaling * (layer.mola_B["default"][e].t() @ hidden)
        updates.append(update)
    return layer.base_layer(x) + torch.stack(updates).view(*x.shape[:-1], -1).to(x.dtype)


@pytest.mark.parametrize("num_tokens", [3, 64])
@pytest.mark.parametrize("training", [True, False])
def test_another_router_of_the_table(num_tokens, training, monkeypatch):
    """Named in the settings: every way through the layer uses it."""
    monkeypatch.setitem(ROUTERS, "sigmoid", sigmoid_router)
    layer = make(router="sigmoid").train(training)
    x = torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(training):
        output = layer(x)
    gates = dense_gates(sigmoid_router(router_logits(x, layer.mola_router["default"]), 2, -1), 3)
    hidden = torch.einsum("erd,nd->ner", layer.mola_A["default"], x)
    update = torch.einsum("ne,ner,ero->no", gates, hidden, layer.mola_B["default"])
    torch.testing.assert_close(output, layer.base_layer(x) + 4.0 * update, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense_gates(layer.route("default", x), 3), gates)


@pytest.mark.parametrize(("num_experts", "top_k"), GRID)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize("shape", [(3, 7, 16), (16,)])
def test_equals_the_loop(num_experts, top_k, dtype, atol, rtol, shape):
    layer = make(num_experts, top_k, dtype=dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for function in (layer, lambda value: loop_over_experts(layer, value)):
        layer.zero_grad()
        value = x.clone().requires_grad_()
        output = function(value)
        output.double().square().mean().backward()
        results.append([output.detach(), value.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_base_that_is_trained_too_gets_its_gradient(trained):
    layer = make()
    layer.base_layer.requires_grad_(False)
    getattr(layer.base_layer, trained).requires_grad_()
    layer(torch.randn(5, 16)).sum().backward()
    assert getattr(layer.base_layer, trained).grad.abs().sum() > 0


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_plain_frozen_base_is_computed_together_with_its_experts(is_fused, monkeypatch):
    calls, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda module, x: calls.append(x) or forward(module, x))
    layer = make()
    layer.base_layer.requires_grad_(not is_fused)
    layer(torch.randn(5, 16))
    assert len(calls) == (0 if is_fused else 1)


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_the_base_layer_are_called(hook):
    layer, called = make(), []
    layer.base_layer.requires_grad_(False)
    getattr(layer.base_layer, f"register_{hook}")(lambda *arguments: called.append(hook))
    layer(torch.randn(1, 2, 16, requires_grad=True)).sum().backward()
    assert called == [hook]


def test_hooks_for_all_modules_are_called():
    layer, called = make(), []
    layer.base_layer.requires_grad_(False)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    layer(torch.randn(1, 2, 16))
    handle.remove()
    assert layer.base_layer in called


def test_another_forward_in_place_of_the_base_layers_is_called():
    """As libraries that move weights between devices put it there."""
    layer, called = make(), []
    layer.base_layer.requires_grad_(False)
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: called.append(x) or forward(x)
    layer(torch.randn(1, 2, 16))
    assert len(called) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_output_may_be_changed_in_place(dtype):
    layer = make(dtype=dtype)
    layer.base_layer.requires_grad_(False)
    x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    (expected,) = torch.autograd.grad((layer(x) * 2).float().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(layer(x).mul_(2).float().sum(), x)[0], expected)


def test_gradcheck():
    layer = make(r=2, inner=5, outer=4, dtype=torch.float64).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    parameters = [*layer.parameters(), x]
    assert torch.autograd.gradcheck(lambda *_: layer(x), parameters, eps=1e-6, atol=1e-5)


def test_every_parameter_gets_a_gradient_even_when_an_expert_is_idle():
    layer = make(num_experts=4, top_k=1)
    with torch.no_grad():
        layer.mola_router["default"].zero_()  # all ties: everything goes to expert 0
    layer(torch.randn(5, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert layer.mola_B["default"].grad[0].any()
    assert not layer.mola_B["default"].grad[1:].any()


def test_empty_and_non_contiguous_input():
    layer = make()
    assert layer(torch.zeros(0, 16)).shape == (0, 24)
    x = torch.randn(16, 6)
    torch.testing.assert_close(layer(x.t()), layer(x.t().contiguous()))


@pytest.mark.parametrize("drawn", ["lora_dropout", "router_jitter_noise"])
def test_eval_is_deterministic_and_training_draws_dropout_and_jitter(drawn):
    layer = make(**{drawn: 0.5})
    x = torch.randn(6, 16)
    for training in (False, True):
        layer.train(training)
        assert torch.equal(layer(x), layer(x)) is not training
        settings = layer.mixture_inputs("default", x, layer.base_layer(x)).settings
        found = {"lora_dropout": settings.dropout, "router_jitter_noise": settings.jitter}
        assert found == {name: 0.5 if training and name == drawn else 0.0 for name in found}


@pytest.mark.parametrize("is_plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_output_dtype_and_routes_in_float32(dtype, is_plain):
    """Logits are those of a float32 product, in either way of computing the layer; natively in another order."""
    noise = 1e-30 if is_plain else 0.0  # too little to change a number, but jitter takes the plain way
    layer = make(dtype=dtype, router_jitter_noise=noise)
    layer.base_layer.requires_grad_(False)
    layer.router_losses = SimpleNamespace(collecting=True)  # what asks a layer to record its logits
    x = torch.randn(50, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    logits = layer.router_outputs["default"].logits
    router = layer.mola_router["default"]
    expected = torch.nn.functional.linear(x.float(), router)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    assert (logits - expected.bfloat16().float()).abs().max() > 1e-4
    torch.testing.assert_close(output.float(), layer(x).float(), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 2), (8, 2)])
def test_compiles_to_one_graph(num_experts, top_k):
    torch._dynamo.reset()
    layer = make(num_experts, top_k, lora_dropout=0.1)
    x = torch.randn(2, 9, 16)
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.train()
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
@pytest.mark.parametrize("top_k", [2, 8])
@pytest.mark.parametrize("tokens", [1, *slow(3), 8, 9, *slow(50)])
def test_compiled_without_gradients(tokens, top_k, dtype, monkeypatch):
    """Without the native function: for up to 8 tokens chosen experts only are read, for more all of them."""
    monkeypatch.setattr(cpu_decode, "_kernel", lambda *dtypes: None)
    torch._dynamo.reset()
    layer = make(8, top_k, dtype=dtype).eval()
    x = torch.randn(1, tokens, 16).to(dtype)
    products = []  # with a whole weight matrix, in the graph that a compiler is given

    def backend(graph, inputs):
        products.extend(node for node in graph.graph.nodes if node.target is torch.nn.functional.linear)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with torch.no_grad():
        output = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)(x)
        assert output.dtype == dtype
        tolerance = {"atol": 1e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(output, layer(x), **tolerance)
    # Base and router; all experts in one more product, or matrices looked up for every token.
    assert len(products) == (2 if tokens <= 8 else 3)


def count(layer, backward=True):
    x = torch.randn(2, 9, 16, requires_grad=True)
    with CountOperators() as counter:
        output = layer(x)
        if backward:
            output.sum().backward()
    return counter


def test_no_host_sync_and_no_growth_with_the_number_of_experts():
    counters = [count(make(num_experts, 2, lora_dropout=0.1)) for num_experts in (3, 8, 32)]
    assert [counter.syncs for counter in counters] == [[], [], []]
    assert len({counter.operators for counter in counters}) == 1


def test_the_counter_notices_a_sync():
    with CountOperators() as counter:
        torch.ones(3)[torch.tensor([True, False, True])].sum().item()
    assert counter.syncs


def test_experts_on_a_base_of_8_bits_are_not_rounded_to_it():
    base = nn.Linear(16, 8, bias=False)
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer = MolaLinear(base, "default", ExpertSettings(3, 2, 2, 16.0))
    for part in (layer.mola_A, layer.mola_B, layer.mola_router):
        assert part["default"].dtype == torch.float32


def test_training_drops_what_kernels_cache(monkeypatch):
    layer, dropped = MolaLinear(nn.Linear(6, 5), "default", ExpertSettings(2, 3, 2, 4.0)), []
    monkeypatch.setattr("mola.tuner.layer.drop_cached_copies", lambda experts: dropped.extend(experts))
    layer.eval()
    assert dropped == []
    nn.Sequential(layer).train()
    assert [each is layer.mola_A["default"] for each in dropped] == [True]
