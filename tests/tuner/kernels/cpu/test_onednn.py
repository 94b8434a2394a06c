"""On which processors, and for which tensors, oneDNN is asked."""

import pytest
import torch
from torch import nn

from mola import MolaError
from mola.tuner.kernels.cpu import onednn
from mola.tuner.kernels.cpu.onednn import onednn_is_faster
from mola.tuner.kernels.gemm import mm, wants_onednn

from ..native import needs_onednn


@pytest.fixture
def fresh():
    """What was decided about the processor is forgotten, before and after."""
    onednn._is_chosen.cache_clear()
    yield
    onednn._is_chosen.cache_clear()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@needs_onednn
def test_only_for_plain_numbers_in_the_cpus_memory(monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)
    a = draw(4, 4)
    assert wants_onednn(a, nn.Parameter(a))
    assert not wants_onednn(a, a.double())
    assert not wants_onednn(a.to("meta"), a)
    assert not wants_onednn(a, a.as_subclass(type("Other", (torch.Tensor,), {})))
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
    monkeypatch.setattr(onednn, "_CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn_is_faster() == expected


@needs_onednn
def test_where_there_is_no_such_file(tmp_path, monkeypatch, fresh):
    monkeypatch.delenv("MOLA_ONEDNN", raising=False)
    monkeypatch.setattr(onednn, "_CPU_FACTS", tmp_path / "missing")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(onednn.platform, "processor", lambda: "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD")
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
    onednn._is_chosen.cache_clear()
    monkeypatch.setenv("MOLA_ONEDNN", "0")
    assert not onednn_is_faster()
    onednn._is_chosen.cache_clear()
    monkeypatch.setenv("MOLA_ONEDNN", "yes")
    with pytest.raises(MolaError, match=r"MOLA_ONEDNN must be 0 or 1, or not be set: got 'yes'"):
        onednn_is_faster()
