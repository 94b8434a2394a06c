"""A case of the benchmarks: the tiny model and a small batch."""

import pytest
from benchmarks.models import Case


@pytest.fixture(scope="module")
def case(tiny_model_dir):
    return Case(
        model="tiny",
        folder=str(tiny_model_dir),
        dtype="float32",
        device="cpu",
        dropout=0.0,
        batch_size=2,
        seq_len=12,
        num_experts="1248",
        r=4,
        top_k=2,
        optimizer=False,
        seed=0,
    )
