"""On which processors there are native products."""

import importlib

import pytest

pytest.importorskip("numba", reason="needs numba (the extra `cpu`)")
jit_instructions = importlib.import_module("mola.tuner.kernels.cpu.jit_instructions")


@pytest.mark.parametrize(
    ("features", "llvm", "single", "half"),
    [
        ("+avx512f,+avx512bw,+avx512bf16,-amx-bf16", 22, True, True),
        ("+avx512f,+avx512bw,+avx512bf16,+amx-bf16", 22, True, False),  # libraries use its matrix instructions
        ("+avx512f,+avx512bw,+avx512bf16,-amx-bf16", 15, True, False),  # which has another name for bfloat16
        ("+avx512f,+avx512bw,-avx512bf16,-amx-bf16", 22, True, False),
        ("+avx512f,-avx512bw", 22, False, False),
        ("+avx2,-avx512f", 22, False, False),
        ("+neon", 22, False, False),
        ("", 22, False, False),
    ],
)
def test_processors(features, llvm, single, half, monkeypatch):
    monkeypatch.setattr(jit_instructions, "_features", lambda: features.split(","))
    monkeypatch.setattr(jit_instructions.llvm, "llvm_version_info", (llvm, 0, 0))
    assert jit_instructions.has_vectors(is_bf16=False) == single
    assert jit_instructions.has_vectors(is_bf16=True) == half
