"""The native function for few tokens: the formula for every size and format, and where it is not used."""

import importlib
import logging
import re
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mola.tuner.few_tokens import MAX_TOKENS
from mola.tuner.products import wants_onednn
from peft import get_peft_model
from torch import nn
from torch.autograd import forward_ad
from transformers import GPT2Config, GPT2LMHeadModel

from mola import MolaLinear
from mola.tuner import native_few, pieces
from mola.tuner.layer import ExpertSettings

from .counting import CountOperators
from .models import VOCABULARY, random_config, tiny_llama, token_batch

numba = pytest.importorskip("numba", reason="needs numba (the extra `cpu`)")

FORMATS = [  # of input and output, of A and B
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
IDS = token_batch(2, 5)["input_ids"]


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def formula(output, x, experts_A, experts_B, router, scaling, top_k):
    """In float64, token by token and expert by expert; of equal logits the first."""
    result = output.double().clone()
    for n, row in enumerate(x.double()):
        logits = router.double() @ row
        chosen = sorted(range(len(router)), key=lambda e: (-logits[e].item(), e))[:top_k]
        gates = torch.softmax(logits[chosen], 0)
        for gate, e in zip(gates, chosen, strict=True):
            result[n] += scaling * gate * (experts_B[e].double().t() @ (experts_A[e].double() @ row))
    return result


def make_layer(in_features=16, out_features=24, **options):
    torch.manual_seed(0)
    defaults = {"r": 4, "num_experts": 4, "top_k": 2, "lora_alpha": 6.0, "init_lora_weights": False}
    base = nn.Linear(in_features, out_features).requires_grad_(False)
    return MolaLinear(base, "default", ExpertSettings(**{**defaults, **options})).eval()


@pytest.fixture
def calls(monkeypatch):
    """Numbers of tokens of the calls of the native function."""
    seen, kernel = [], native_few._kernel

    def counting(*formats):
        function = kernel(*formats)

        def call(*arguments):
            seen.append(arguments[5])
            return function(*arguments)

        return None if function is None else call

    monkeypatch.setattr(native_few, "_kernel", counting)
    return seen


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@given(
    num_tokens=st.integers(1, 5),
    num_experts=st.integers(2, 9),
    r=st.integers(1, 9),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    top_k=st.integers(1, 9),
    scaling=st.sampled_from([0.0, 0.5, -2.0]),
)
def test_the_formula(formats, num_tokens, num_experts, r, in_features, out_features, top_k, scaling):
    values, weights = formats
    top_k = min(top_k, num_experts)
    x, output = draw(num_tokens, in_features, dtype=values), draw(num_tokens, out_features, dtype=values)
    experts_A = draw(num_experts, r, in_features, dtype=weights)
    experts_B = draw(num_experts, r, out_features, dtype=weights)
    router = draw(num_experts, in_features) / in_features
    exact = formula(output, x, experts_A, experts_B, router, scaling, top_k)
    native_few.add_few(output, x, experts_A, experts_B, router, scaling, top_k)
    # In float32, then rounded once: to the nearest number of the output's format.
    tolerance = 2e-5 * max(1.0, exact.abs().max().item())
    rounding = 2.0**-8 * exact.abs() if values == torch.bfloat16 else 0.0
    assert ((output.double() - exact).abs() <= rounding + tolerance).all()


def test_of_equal_logits_the_first_are_chosen():
    layer = make_layer(num_experts=8, top_k=3)
    nn.init.zeros_(layer.mola_router["default"])
    x = draw(4, 16)
    A, B = (part["default"][:3].detach() for part in (layer.mola_A, layer.mola_B))
    update = torch.einsum("ni,eri,ero->no", x, A, B) * layer.scaling["default"] / 3
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_stay_in_their_token(value):
    layer, x = make_layer(), draw(4, 16)
    x[1, 3] = value
    with torch.no_grad():
        output = layer(x)
    torch.testing.assert_close(output[[0, 2, 3]], layer(x).detach()[[0, 2, 3]])
    assert not output[1].isfinite().all()


def test_a_router_that_is_no_number_is_not_passed_over():
    layer, x = make_layer(top_k=1), draw(4, 16)
    with torch.no_grad():
        layer.mola_router["default"][2] = float("nan")
        assert layer(x).isnan().all()
    assert layer(x).isnan().all()


def test_a_token_has_the_same_bits_in_every_batch(calls):
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
    monkeypatch.setattr(native_few, "_kernel", lambda *formats: None)
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


@pytest.mark.parametrize("num_tokens", [1, MAX_TOKENS, MAX_TOKENS + 1])
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_compiler_sees_one_operator(formats, num_tokens):
    values, weights = formats
    layer = make_layer()
    layer.base_layer.to(values)
    for part in (layer.mola_A, layer.mola_B):
        part.to(weights)
    x = draw(2, num_tokens, 16, dtype=values)[:1]
    output, operators = compiled(layer, x)
    operator = "mola.linear_few" if wants_onednn(x, layer.base_layer.weight) else "mola.add_few"
    assert [name for name in operators if name.startswith("mola.")] == [operator] * (num_tokens <= MAX_TOKENS)
    with torch.no_grad():
        tolerance = {"atol": 5e-2, "rtol": 3e-2} if torch.bfloat16 in formats else {}
        torch.testing.assert_close(output, layer(x), **tolerance)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_compiled_by_a_backend(backend):
    torch._dynamo.reset()
    layer, inputs = make_layer(), [draw(3, 16, seed=seed) for seed in range(3)]
    function = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    for x in inputs:
        before = x.clone()
        torch.testing.assert_close(function(x), layer(x))
        assert torch.equal(x, before)


@torch.no_grad()
def test_compiled_for_an_input_with_gaps():
    torch._dynamo.reset()
    layer, x = make_layer(), draw(3, 32)[:, ::2]
    output = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)(x)
    torch.testing.assert_close(output, layer(x))


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
def test_an_exported_program_needs_no_operator_of_mola():
    layer, x = make_layer(), draw(3, 16)
    program = torch.export.export(layer, (x,))
    assert "mola" not in {str(node.target).partition(".")[0] for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), layer(x))


def test_what_the_function_can_not_read_is_refused():
    x, A, B = draw(3, 16), draw(4, 2, 16), draw(4, 2, 24)
    with pytest.raises(RuntimeError, match="contiguous"):
        native_few.add_few(draw(24, 3).t(), x, A, B, draw(4, 16), 1.0, 2)
    with pytest.raises(RuntimeError, match="do not fit"):
        native_few.add_few(draw(3, 24), x, A, B[:3], draw(4, 16), 1.0, 2)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        native_few.add_few(draw(3, 24).double(), x.double(), A.double(), B.double(), draw(4, 16), 1.0, 2)


# ------------------------------------------------------------------ where it is not used


def test_where_the_usual_way_is_taken(calls):
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


def test_an_input_with_more_digits_than_the_experts_is_rounded_as_always(calls):
    layer, x = make_layer(), draw(3, 16)
    for part in (layer.mola_A, layer.mola_B):
        part.to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x).detach())
    assert calls == []


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


def test_parameters_of_another_shape_end_in_an_error():
    layer = make_layer()
    layer.mola_router["default"] = nn.Parameter(torch.zeros(4, 15))
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(draw(3, 16))
    layer = make_layer()
    layer.base_layer = nn.Linear(16, 25)
    with torch.no_grad(), pytest.raises(ValueError, match="base layer's output"):
        layer(draw(3, 16))


@pytest.mark.parametrize(
    ("error", "level", "message"),
    [
        (ModuleNotFoundError("No module named 'numba'", name="numba"), logging.INFO, r"pip install 'mola-peft\[cpu\]'"),
        (ImportError("Numba needs NumPy 9.9 or less"), logging.WARNING, "Numba needs NumPy 9.9 or less"),
    ],
)
def test_without_numba_one_line_says_so(error, level, message, monkeypatch, caplog):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    remembering = pieces.import_native, pieces._say_once
    for function in remembering:
        function.cache_clear()
    try:
        layer, x = make_layer(), draw(3, 16)
        with caplog.at_level(logging.INFO), torch.no_grad():
            few = [layer(x), layer(x), layer.to(torch.bfloat16)(x.bfloat16())]
        torch.testing.assert_close(few[0], make_layer()(x).detach())
        lines = [record for record in caplog.records if "numba" in record.message]
        assert [line.levelno for line in lines] == [level]
        assert re.search(message, lines[0].message)
    finally:
        for function in remembering:  # tests after this one have numba again
            function.cache_clear()


def test_code_that_can_not_be_kept_on_disk_is_compiled_all_the_same(monkeypatch, caplog):
    from mola.tuner import native

    real = numba.njit

    def without_a_folder(*arguments, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "njit", without_a_folder)
    native.kernel.cache_clear()
    try:
        layer, x = make_layer(), draw(3, 16)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), make_layer()(x).detach())
        assert "no locator available" in caplog.text
    finally:
        native.kernel.cache_clear()
