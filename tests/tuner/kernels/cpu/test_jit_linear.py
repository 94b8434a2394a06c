"""The native linear map of few tokens: the values of torch's, nothing written beside them, and where it is used."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mola.tuner.kernels import gemm, native
from mola.tuner.kernels.gemm import _native_linear, float32_linear
from mola.tuner.layer import ExpertSettings, MolaLinear

from ..native import needs_vectors

pytestmark = needs_vectors(torch.float32)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@given(st.integers(1, 32), st.integers(1, 40).map(lambda n: 16 * n), st.integers(1, 70), st.booleans())
def test_any_size(num_tokens, in_features, out_features, with_bias):
    x, weight = draw(num_tokens, in_features), draw(out_features, in_features, seed=1) / in_features**0.5
    bias = draw(out_features, seed=2) if with_bias else None
    assert _native_linear(x, weight, bias) is not None
    torch.testing.assert_close(float32_linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 32), (32,), (1, 1, 1, 32)])
def test_any_number_of_dimensions_and_an_input_with_gaps(shape):
    x, weight = draw(*shape[:-1], 64)[..., ::2], draw(5, 32)
    assert not x.is_contiguous()
    torch.testing.assert_close(float32_linear(x, weight, None), F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours():
    x, weight = draw(20, 160), draw(33, 160)
    together = float32_linear(x, weight, None)
    for n in (0, 7, 8, 19):
        assert torch.equal(float32_linear(x[n : n + 1], weight, None)[0], together[n])
    x[3, 5] = float("nan")
    assert torch.equal(float32_linear(x, weight, None).isnan().any(1), torch.arange(20) == 3)


@pytest.mark.parametrize("out_features", [1, 2, 3, 31])
@pytest.mark.parametrize("num_tokens", [1, 8, 9])
def test_nothing_is_written_beside_the_output(num_tokens, out_features):
    x, weight = draw(num_tokens, 48), draw(out_features, 48)
    memory = torch.full((num_tokens * out_features + 200,), 77.0)
    output = memory[100:-100].view(num_tokens, out_features)
    native.load("jit_decode").linear_kernel()(
        x.data_ptr(), weight.data_ptr(), 0, output.data_ptr(), num_tokens, 48, out_features
    )
    torch.testing.assert_close(output, x @ weight.t(), atol=1e-4, rtol=1e-5)
    assert (memory[:100] == 77).all()
    assert (memory[-100:] == 77).all()


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (draw(33, 32), draw(5, 32), None),  # too many tokens
        (draw(4, 24), draw(5, 24), None),
        (draw(4, 32), draw(32, 5).t(), None),
        (draw(4, 32), draw(5, 32), draw(5).double()),
        (draw(4, 32), draw(5, 32), draw(10)[::2]),
        (draw(4, 32).to("meta"), draw(5, 32).to("meta"), None),
        (draw(4, 64), draw(5, 32), None),  # which is an error
    ],
    ids=["tokens", "columns", "transposed", "bias_dtype", "bias_gaps", "meta", "features"],
)
def test_where_it_is_not_used(x, weight, bias):
    assert _native_linear(x, weight, bias) is None


def test_only_on_one_thread_and_with_numba(monkeypatch):
    x, weight = draw(4, 32), draw(5, 32)
    assert _native_linear(x, weight, None) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert _native_linear(x, weight, None) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(native, "load", lambda name: None)
    assert _native_linear(x, weight, None) is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_uses_it_and_computes_the_same(bias, monkeypatch):
    base = nn.Linear(32, 24, bias=bias).requires_grad_(False)
    layer = MolaLinear(base, "default", ExpertSettings(4, 3, 2, 8.0, init_lora_weights=False)).eval()
    x, used = draw(2, 3, 32), []
    results = []
    monkeypatch.setattr(gemm, "_native_linear", lambda *tensors: used.append(tensors) or _native_linear(*tensors))
    for choice in (True, False):
        monkeypatch.setattr(gemm, "onednn_is_faster", lambda choice=choice: choice)
        with torch.no_grad():
            results.append(layer(x))
    assert len(used) == 1
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
