"""Few tokens by one native function, also as an operator of compiled graphs: any size, and where it is used."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.autograd import forward_ad
from transformers import GPT2Config, GPT2LMHeadModel

from mola import MolaLinear
from mola.tuner.kernels.api import NO_ROUTER, NOT_PLAIN, OTHER_ROUTER
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.cpu import decode
from mola.tuner.kernels.cpu.decode import CPU_DECODE
from mola.tuner.kernels.decode import MAX_TOKENS
from mola.tuner.kernels.gemm import uses_onednn
from mola.tuner.kernels.reference import Reference
from mola.tuner.layer import ExpertSettings
from tests.grids import slow
from tests.versions import needs

from ...counting import CountOperators
from ...models import VOCABULARY, random_config, tiny_llama, token_batch
from ..inputs import in_float64, make_inputs
from ..native import needs_compiler

pytest.importorskip("numba", reason="needs numba (the extra `cpu`)")

DTYPES = [  # of input and output, of A and B
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
IDS = token_batch(2, 5)["input_ids"]


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_layer(in_features=16, out_features=24, **options):
    torch.manual_seed(0)
    defaults = {"r": 4, "num_experts": 4, "top_k": 2, "lora_alpha": 6.0, "init_lora_weights": False}
    base = nn.Linear(in_features, out_features).requires_grad_(False)
    return MolaLinear(base, "default", ExpertSettings(**{**defaults, **options})).eval()


@pytest.fixture
def calls(monkeypatch):
    """Numbers of tokens of the calls of the native function."""
    seen, kernel = [], decode._kernel

    def counting(*dtypes):
        function = kernel(*dtypes)

        def call(*arguments):
            seen.append(arguments[5])
            return function(*arguments)

        return None if function is None else call

    monkeypatch.setattr(decode, "_kernel", counting)
    return seen


# ------------------------------------------------------------------ values


def make(shape=(3, 16), values=torch.float32, weights=torch.float32, num_experts=4, **options):
    """Inputs whose router is in float32 and whose logits nobody reads."""
    inputs = make_inputs(shape, num_experts, weights, x_dtype=values, **options)
    return inputs._replace(settings=inputs.settings._replace(needs_router_output=False))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@given(
    num_tokens=st.integers(1, 5),
    num_experts=st.integers(2, 9),
    r=st.integers(1, 9),
    in_features=st.integers(1, 70),
    out=st.integers(1, 70),
    top_k=st.integers(1, 9),
    scaling=st.sampled_from([0.0, 0.5, -2.0]),
)
@torch.no_grad()
def test_any_size(dtypes, num_tokens, num_experts, in_features, top_k, **sizes):
    inputs = make((num_tokens, in_features), *dtypes, num_experts, top_k=min(top_k, num_experts), fused=False, **sizes)
    exact = compute(Reference(), in_float64(inputs)).output
    assert CPU_DECODE.why_unsupported(inputs) is None
    output = compute(CPU_DECODE, inputs).output
    # In float32, then rounded once: to the nearest number of the output's dtype.
    tolerance = 2e-5 * max(1.0, exact.abs().max().item())
    rounding = 2.0**-8 * exact.abs() if dtypes[0] == torch.bfloat16 else 0.0
    assert ((output.double() - exact).abs() <= rounding + tolerance).all()


def test_a_token_is_computed_alike_in_every_batch(calls):
    layer, x = make_layer(), draw(MAX_TOKENS, 16)
    with torch.no_grad():
        together = layer(x) - layer.base_layer(x)
        alone = torch.cat([layer(row) - layer.base_layer(row) for row in x.split(1)])
    torch.testing.assert_close(together, alone)
    assert calls == [MAX_TOKENS] + [1] * MAX_TOKENS


# ------------------------------------------------------------------ whole models


def adapted(model=None, **options):
    torch.manual_seed(3)
    return get_peft_model(tiny_llama() if model is None else model, random_config(**options)).eval()


def generate(model, **options):
    fixed = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0}
    fixed |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    return torch.stack(model.generate(input_ids=IDS, **{**fixed, **options}).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generated_text_is_the_same_without_numba(options, monkeypatch, calls):
    model = adapted()
    native = generate(model, **options)
    count = len(calls)
    assert count >= 28 * 4  # every linear for every token
    monkeypatch.setattr(decode, "_kernel", lambda *dtypes: None)
    torch.testing.assert_close(generate(model, **options), native)
    assert len(calls) == count


def test_no_operators_but_those_of_the_base():
    model = adapted()

    def operators_of_a_token():
        counts = []
        for tokens in (3, 4):
            with CountOperators() as counter:
                generate(model, max_new_tokens=tokens, min_new_tokens=tokens)
            counts.append(counter.operators)
        return counts[1] - counts[0]

    with model.disable_adapter():
        base = operators_of_a_token()
    assert operators_of_a_token() <= base  # fewer where another library makes the base products


def test_a_base_that_is_no_plain_linear(calls):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    model = adapted(GPT2LMHeadModel(config))
    with torch.no_grad():
        output = model(input_ids=IDS).logits
    assert len(calls) == 2  # one adapted linear in each layer
    torch.testing.assert_close(output, model(input_ids=IDS).logits.detach())


def test_what_a_hook_keeps_of_the_base_output_is_not_changed(calls):
    layer, x, seen = make_layer(), draw(3, 16), []
    layer.base_layer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(seen[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    assert calls == [3]


def test_threads_on_one_layer(calls):
    layer, inputs = make_layer(), [draw(3, 16, seed=seed) for seed in range(4)]
    expected, results = [layer(x).detach() for x in inputs], {}
    start = threading.Barrier(len(inputs))

    def work(index):
        start.wait()
        with torch.no_grad():
            results[index] = [layer(inputs[index]) for _ in range(200)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, wanted in enumerate(expected):
        torch.testing.assert_close(results[index], [wanted] * 200)


# ------------------------------------------------------------------ compiled


@torch.no_grad()
def compiled(layer, x, **options):
    """Output of the compiled layer, and the names of the operators in its graph."""
    found = []

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    output = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)(x)
    return output, found


compiles = needs(
    "torch", "2.13", "its `is_exporting` is true under `torch.compile` too, which then gets plain operators"
)


@compiles
@pytest.mark.parametrize(
    ("dtypes", "num_tokens"),
    [(DTYPES[0], 1), (DTYPES[0], MAX_TOKENS + 1), (DTYPES[2], MAX_TOKENS), *slow((DTYPES[1], 1))],
    ids=str,
)
def test_a_compiler_sees_one_operator(dtypes, num_tokens):
    values, weights = dtypes
    layer = make_layer()
    layer.base_layer.to(values)
    for part in (layer.mola_A, layer.mola_B):
        part.to(weights)
    x = draw(2, num_tokens, 16, dtype=values)[:1]
    output, operators = compiled(layer, x)
    operator = "mola.linear_decode" if uses_onednn(x, layer.base_layer.weight) else "mola.decode"
    assert [name for name in operators if name.startswith("mola.")] == [operator] * (num_tokens <= MAX_TOKENS)
    with torch.no_grad():
        tolerance = {"atol": 5e-2, "rtol": 3e-2} if torch.bfloat16 in dtypes else {}
        torch.testing.assert_close(output, layer(x), **tolerance)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
@torch.no_grad()
def test_compiled_by_a_backend(backend):
    torch._dynamo.reset()
    layer, inputs = make_layer(), [draw(3, 16), draw(3, 16, seed=1), draw(3, 32)[:, ::2]]  # the last one has gaps
    function = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    for x in inputs:
        before = x.clone()
        torch.testing.assert_close(function(x), layer(x))
        assert torch.equal(x, before)


@torch.no_grad()
def test_compiled_with_a_base_whose_output_is_kept_elsewhere():
    class Same(nn.Linear):
        def forward(self, x):
            return x

    layer = make_layer(16, 16)
    layer.base_layer = Same(16, 16)
    x = draw(3, 16)
    before = x.clone()
    torch._dynamo.reset()
    output = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(output, layer(x))
    seen = []
    layer = make_layer()
    layer.base_layer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", dynamic=False)(x)
    torch.testing.assert_close(seen[-1], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


@torch.no_grad()
def test_compiled_with_a_base_whose_output_has_another_dtype():
    class Widening(nn.Linear):
        def forward(self, x):
            return super().forward(x).float()

    layer, x = make_layer(), draw(3, 16, dtype=torch.bfloat16)
    layer.base_layer = Widening(16, 24, dtype=torch.bfloat16)
    output, operators = compiled(layer, x)
    assert not [name for name in operators if name.startswith("mola.")]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, layer(x))


@torch.no_grad()
def test_an_exported_program_needs_no_operator_of_mola():
    layer, x = make_layer(), draw(3, 16)
    program = torch.export.export(layer, (x,))
    assert "mola" not in {str(node.target).partition(".")[0] for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), layer(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_layer_can_be_traced(tokens):
    """Its sizes are tensors then, which compiled functions do not take."""
    layer, x = make_layer(), draw(tokens, 16)
    program = torch.jit.trace(layer, x)
    torch.testing.assert_close(program(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("why", ["training mode", "a forced backend"])
def test_compiled_without_the_operator(why, force):
    layer, x = make_layer(), draw(3, 16)
    if why == "training mode":
        layer.train()
    else:
        force("reference")
    output, operators = compiled(layer, x)
    assert not [name for name in operators if name.startswith("mola.")]
    torch.testing.assert_close(output, layer(x))


@torch.no_grad()
def test_operators_know_their_shapes():
    layer, x = make_layer(), draw(1, 3, 16)
    arguments = x, layer.base_layer.weight, layer.base_layer.bias, layer.mola_B["default"]
    shape = torch.ops.mola.linear_decode(*(each.to("meta") for each in arguments)).shape
    output = torch.ops.mola.linear_decode(*arguments)
    assert output.shape == shape == (1, 3, 24)
    torch.testing.assert_close(output, layer(x))


def test_what_the_function_cannot_read_is_refused():
    x, A, B, router = draw(3, 16), draw(4, 2, 16), draw(4, 2, 24), draw(4, 16)
    with pytest.raises(RuntimeError, match="contiguous"):
        decode.add_update(draw(24, 3).t(), x, A, B, router, 1.0, 2)
    for others in (
        (x, A, B[:3], router),
        (x, A, draw(4, 3, 24), router),
        (x, A, B, router[:3]),
        (x[:, :8], A, B, router),
    ):
        with pytest.raises(RuntimeError, match="do not fit"):
            decode.add_update(draw(3, 24), *others, 1.0, 2)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        decode.add_update(draw(3, 24).double(), x.double(), A.double(), B.double(), router, 1.0, 2)
    with pytest.raises(ValueError, match="base layer's output"):
        decode.add_update(draw(3, 25), x, A, B, router, 1.0, 2)


# ------------------------------------------------------------------ where it is used


def test_in_which_modes_of_a_layer(calls):
    layer, x = make_layer(lora_dropout=0.5), draw(3, 16)
    layer(x)  # gradients
    with torch.no_grad():
        layer(draw(MAX_TOKENS + 1, 16))
        layer.train()(x)
        layer.eval().mola_dropout.train()
        layer(x)
        layer.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        layer.double()(x.double())
        layer.half()(x.half())
    assert calls == []
    with torch.inference_mode():
        layer.float()(x)
    assert calls == [3]


def test_in_training_mode_unless_the_router_has_more_to_do(calls):
    x = draw(3, 16)
    with torch.no_grad():
        layer = make_layer()
        expected = layer(x)
        torch.testing.assert_close(layer.train()(x), expected)
        assert calls == [3, 3]
        layer.router_losses = SimpleNamespace(collecting=True)
        torch.testing.assert_close(layer(x), expected)
        assert layer.router_outputs["default"].logits.shape == (3, 4)
        make_layer(router_jitter_noise=0.1).train()(x)
    assert calls == [3, 3]


NO_GRADIENTS, WANTED, FUNCTION = (
    "only without gradients",
    "router outputs or jitter are wanted",
    "no native function for",
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"router": None}, NO_ROUTER),
        ({"router": torch.zeros(4, 16).double()}, OTHER_ROUTER),
        ({"settings": {"router": "sigmoid"}}, OTHER_ROUTER),
        ({"settings": {"needs_router_output": True}}, WANTED),
        ({"settings": {"jitter": 0.1}}, WANTED),
        ({"settings": {"dropout": 0.1}}, "dropout is on"),
        ({"dropout_mask": torch.ones(3, 16, dtype=torch.bool)}, "dropout is on"),
        ({"x": torch.zeros(3, 16).double()}, f"{FUNCTION} these dtypes"),
        ({"experts_B": torch.zeros(4, 3, 7).bfloat16()}, f"{FUNCTION} these dtypes"),
        ({"base_output": torch.zeros(3, 7).bfloat16()}, "the dtypes of base output and input differ"),
        ({"x": torch.zeros(3, 16).as_subclass(type("Other", (torch.Tensor,), {}))}, NOT_PLAIN),
    ],
)
@torch.no_grad()
def test_what_it_does_not_compute(change, reason):
    inputs = make(fused=False)
    assert CPU_DECODE.why_unsupported(inputs) is CPU_DECODE.why_slower(inputs) is None
    if "settings" in change:
        change = {"settings": inputs.settings._replace(**change["settings"])}
    assert reason in CPU_DECODE.why_unsupported(inputs._replace(**change))


def test_an_input_with_more_digits_than_the_experts_is_rounded_as_always(calls):
    layer, x = make_layer(), draw(3, 16)
    for part in (layer.mola_A, layer.mola_B):
        part.to(torch.bfloat16)
    with torch.no_grad():
        output = layer(x)
    assert calls == []
    torch.testing.assert_close(output, layer(x).detach(), atol=1e-2, rtol=3e-2)  # another order of roundings


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_under_torch_func_and_forward_derivatives(calls):
    layer, x = make_layer(), draw(3, 16)
    tangent = draw(3, 16, seed=1)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    assert calls == [3]
    step = 1e-3
    difference = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    del calls[:]
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(derivative, difference, atol=2e-2, rtol=1e-2)
    assert calls == []
