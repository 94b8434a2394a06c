"""Products by oneDNN are those of torch; on which processors and for which tensors oneDNN makes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mola import MolaError
from mola.tuner.kernels import gemm as library
from mola.tuner.kernels.gemm import addmm_, base_output, linear, linear_add, mm, onednn_is_faster, uses_onednn
from mola.tuner.layer import ExpertSettings, MolaLinear

from .inputs import make_inputs
from .native import needs_onednn


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["oneDNN", "torch"])
def onednn(request, monkeypatch):
    monkeypatch.setattr(library, "onednn_is_faster", lambda: request.param)
    return request.param


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (64, 33, 16), (1, 8, 1), (0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_values(sizes, dtype, onednn):
    n, k, m = sizes
    tolerance = {"atol": 0.3, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
    for a in (draw(n, k, dtype=dtype), draw(k, n, dtype=dtype).t()):
        for b in (draw(k, m, dtype=dtype), draw(m, k, dtype=dtype).t(), draw(k, 2 * m, dtype=dtype)[:, ::2]):
            torch.testing.assert_close(mm(a, b), a @ b, **tolerance)
            total = draw(n, m, dtype=dtype)
            torch.testing.assert_close(addmm_(total.clone(), a, b), total + a @ b, **tolerance)
            for bias in (None, draw(m, dtype=dtype)):
                torch.testing.assert_close(linear(a, b.t(), bias), F.linear(a, b.t(), bias), **tolerance)


def test_a_wider_total_keeps_its_format(onednn):
    total, a, b = draw(4, 3), draw(4, 5, dtype=torch.bfloat16), draw(5, 3, dtype=torch.bfloat16)
    added = addmm_(total.clone(), a, b)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added, total + (a @ b).float())


@needs_onednn
@pytest.mark.parametrize("bias", [None, draw(7)], ids=["", "bias"])
def test_an_addend_is_added_by_the_product(bias):
    x, weight, addend = draw(5, 9), draw(7, 9), draw(5, 7)
    expected = F.linear(x, weight, bias) + addend
    torch.testing.assert_close(linear_add(x, weight, bias, addend), expected)


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 3, 9), (0, 9), (2, 0, 9)], ids=str)
@torch.no_grad()
def test_base_output(shape, onednn):
    inputs = make_inputs(shape, 4, torch.float32, bias=True)
    made = base_output(inputs, inputs.x)
    torch.testing.assert_close(made, F.linear(inputs.x, inputs.weight, inputs.bias))
    assert not made._is_view()
    result = torch.ones(7, *shape[:-1]).movedim(0, -1)
    copy = base_output(inputs._replace(weight=None, base_output=result), inputs.x.bfloat16())
    assert copy.is_contiguous()
    assert copy.dtype == torch.float32
    assert copy.numel() == 0 or copy.data_ptr() != result.data_ptr()
    assert torch.equal(copy, result)
    wide = base_output(inputs._replace(weight=None, base_output=result.bfloat16()), inputs.x)
    assert wide.dtype == torch.float32


@needs_onednn
def test_a_layer_computes_the_same(monkeypatch):
    layer = MolaLinear(nn.Linear(16, 24), "default", ExpertSettings(4, 3, 2, 8.0, init_lora_weights=False))
    layer.base_layer.requires_grad_(False)
    results = []
    for choice in (True, False):
        monkeypatch.setattr(library, "onednn_is_faster", lambda choice=choice: choice)
        x = draw(2, 50, 16).requires_grad_()
        layer.train()
        output = layer(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])
        layer.eval()
        with torch.no_grad():
            few, many = layer(x[:, :3]), layer(x)
        results.append([output, *gradients, few, many])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture
def fresh():
    """What was decided about the processor is forgotten, before and after."""
    library._is_onednn_chosen.cache_clear()
    yield
    library._is_onednn_chosen.cache_clear()


@needs_onednn
def test_only_for_plain_numbers_in_the_cpus_memory(monkeypatch):
    monkeypatch.setattr(library, "onednn_is_faster", lambda: True)
    a = draw(4, 4)
    assert uses_onednn(a, nn.Parameter(a))
    assert not uses_onednn(a, a.double())
    assert not uses_onednn(a.to("meta"), a)
    assert not uses_onednn(a, a.as_subclass(type("Other", (torch.Tensor,), {})))
    torch.testing.assert_close(torch.vmap(lambda rows: mm(rows, a))(draw(3, 4, 4)), draw(3, 4, 4) @ a)


ZEN_5 = "processor : 0\nvendor_id : AuthenticAMD\ncpu family : 26\nmodel : 2\n"


@needs_onednn
@pytest.mark.parametrize(
    ("facts", "capability", "expected"),
    [
        (ZEN_5, "AVX512", True),
        (ZEN_5, "AVX2", False),
        (ZEN_5.replace("26", "25"), "AVX512", True),  # Zen 4
        (ZEN_5.replace("26", "25"), "AVX2", False),  # Zen 3
        (ZEN_5.replace("26", "23"), "AVX512", False),
        (ZEN_5.replace("AuthenticAMD", "GenuineIntel"), "AVX512", False),
        ("CPU implementer : 0x41", "DEFAULT", False),
        ("AuthenticAMD", "AVX512", False),
    ],
)
def test_on_which_processors(facts, capability, expected, tmp_path, monkeypatch, fresh):
    (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.delenv("MOLA_ONEDNN", raising=False)
    monkeypatch.setattr(library, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn_is_faster() == expected


@needs_onednn
def test_where_there_is_no_such_file(tmp_path, monkeypatch, fresh):
    monkeypatch.delenv("MOLA_ONEDNN", raising=False)
    monkeypatch.setattr(library, "_CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(library.platform, "processor", lambda: "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD")
    assert onednn_is_faster()


@needs_onednn
def test_the_environment_decides(monkeypatch, fresh):
    monkeypatch.setenv("MOLA_ONEDNN", "1")
    assert onednn_is_faster()
    torch._C._set_mkldnn_enabled(False)  # not by `flags`, which warns on some builds
    try:
        assert not onednn_is_faster()
    finally:
        torch._C._set_mkldnn_enabled(True)
    library._is_onednn_chosen.cache_clear()
    monkeypatch.setenv("MOLA_ONEDNN", "0")
    assert not onednn_is_faster()
    library._is_onednn_chosen.cache_clear()
    monkeypatch.setenv("MOLA_ONEDNN", "yes")
    with pytest.raises(MolaError, match=r"MOLA_ONEDNN must be 0 or 1, or not be set: got 'yes'"):
        onednn_is_faster()
