"""Whole training steps on fake CUDA tensors: nothing may make the host wait for a device. Run by `test_triton` in a
process of its own, for devices of type cuda must exist before torch is imported."""

# ruff: noqa: E402

import contextlib

from benchmarks import fake_cuda

fake_cuda.load()

from unittest.mock import patch

import torch
from benchmarks.counting import OperatorCounter
from benchmarks.launches import autocast, make_fake, triton_counted
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import LlamaConfig, LlamaForCausalLM

from mola import MolaConfig
from mola.tuner.kernels import native
from mola.tuner.kernels.dispatch import mixture
from mola.tuner.kernels.gpu import backend, first_use
from mola.tuner.layer import MolaLinear

SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="eager",
)


def fake_model(**options):
    """A mixture on a random model, of fake CUDA tensors."""
    with unset_fake_temporarily():
        base = LlamaForCausalLM(SHAPE).to(torch.bfloat16)
        model = get_peft_model(base, MolaConfig(num_experts="1248", task_type="CAUSAL_LM", **options)).train()
    make_fake(model)
    return model


@contextlib.contextmanager
def backends(*, use_triton):
    """Which backends computed; fake weights are no plain tensors, and nothing can be tried first."""
    used = set()

    def counted(inputs):
        from mola.tuner.kernels.dispatch import select

        used.add(select(inputs).name)
        return mixture(inputs)

    plain = (*backend.PLAIN_TYPES, FakeTensor) if use_triton else backend.PLAIN_TYPES
    with (
        patch.object(backend, "PLAIN_TYPES", plain),
        patch.object(first_use, "why_wrong", lambda *_: None),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)),
        patch("mola.tuner.layer.mixture", counted),
        triton_counted(list),
    ):
        yield used


def step(model, ids):
    with OperatorCounter() as counter:
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    return counter.syncs


def main():
    """Runs all kinds of steps; an operator whose result the host must know raises, for fake tensors have none."""
    assert native.load("launch", "gpu") is not None
    for options in (
        {},
        {"lora_dropout": 0.1},
        {"router_aux_loss_coef": 1e-3},
        {"router_aux_loss_coef": 1e-3, "router_aux_loss_reduction": "layer", "router_z_loss_coef": 1e-3},
        {"router_jitter_noise": 0.1},
    ):
        for use_triton in (False, True):
            with FakeTensorMode(), autocast(torch.float32), backends(use_triton=use_triton) as used:
                model = fake_model(**options)
                ids = torch.zeros(2, 12, dtype=torch.int64, device="cuda")
                syncs = step(model, ids)
                own = [each for each in syncs if "attention" not in each]
                assert not own, own
                layer = next(module for module in model.modules() if isinstance(module, MolaLinear))
                assert isinstance(layer.mola_A["default"].grad, FakeTensor)
                assert model.base_model.model.model.layers[3].self_attn.q_proj.mola_router["default"].grad is not None
            many = {"reference"} if "router_jitter_noise" in options else {"triton" if use_triton else "dense"}
            assert used == {"lora"} | many, used
            print(options, sorted(used), "no sync")


if __name__ == "__main__":
    main()
    fake_cuda.leave(0)
