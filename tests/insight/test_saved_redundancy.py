"""With numpy, the experts of a saved adapter are as alike as torch finds them."""

import math
from dataclasses import astuple

import pytest
import torch
from safetensors.torch import save_file

from mola.checkpoints.adapter_folder import read_arrays, read_tensors
from mola.insight.inspection import module_redundancy
from mola.insight.saved_redundancy import redundancy_of_arrays


def both(experts_A, experts_B, scaling=2.0):
    arrays = experts_A.double().numpy(), experts_B.double().numpy()
    ours = redundancy_of_arrays("module", 3, *arrays, scaling)
    expected = module_redundancy("module", 3, experts_A, experts_B, scaling)
    return astuple(ours)[2:], astuple(expected)[2:]


@pytest.mark.parametrize(("num_experts", "r"), [(2, 1), (5, 8), (8, 64)])
def test_values_are_those_of_torch(num_experts, r):
    torch.manual_seed(0)
    ours, expected = both(torch.randn(num_experts, r, 96), 1e-3 * torch.randn(num_experts, r, 48))
    assert ours == pytest.approx(expected, rel=1e-8)


def test_ranks_and_directions_are_those_of_torch():
    """Equal experts, one of a lower rank, and one whose directions are of very different lengths."""
    torch.manual_seed(1)
    first = torch.randn(4, 64)
    flat, uneven = first.clone(), first * torch.tensor([1.0, 1e-1, 1e-2, 1e-3])[:, None]
    flat[3] = flat[0] - flat[2]
    stack = torch.stack([first, first, flat, uneven])
    ours, expected = both(stack, torch.randn(4, 4, 32))
    assert ours == pytest.approx(expected, rel=1e-6)


def test_new_experts_have_no_output_directions():
    ours, expected = both(torch.randn(3, 4, 16), torch.zeros(3, 4, 16))
    assert ours[0] == expected[0] == 0
    assert math.isnan(ours[2])
    assert math.isnan(expected[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_format_is_read_exactly(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 4, 5).to(dtype), "b": torch.zeros(2, dtype=dtype), "c": torch.ones(()).to(dtype)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    arrays = read_arrays(tmp_path)
    for name, tensor in read_tensors(tmp_path).items():
        assert torch.equal(torch.from_numpy(arrays[name].copy()).double(), tensor.double())


def test_a_pickle_is_read(tmp_path):
    tensors = {"a": torch.randn(3, 4)}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert torch.equal(torch.from_numpy(read_arrays(tmp_path)["a"]), tensors["a"].double())
