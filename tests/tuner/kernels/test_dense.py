"""The dense backend: what it costs, and routers whose gradient it does not know."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from mola.tuner.kernels.api import NO_ROUTER
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dense import Dense
from mola.tuner.kernels.reference import Reference
from mola.tuner.routing import ROUTERS

from ..counting import CountOperators
from ..models import clone, random_config, tiny_llama, token_batch
from ..test_routing import sigmoid_router
from .inputs import in_float64, leaves, make_inputs


def kept_bytes(model, batch):
    """Bytes that a forward pass keeps for the backward pass, each storage once, weights left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for size, _ in seen.values())


def adapted_bytes(config, batch, base):
    """Bytes kept per token and adapted linear on top of the frozen base."""
    floor = clone(base)
    floor.requires_grad_(False)
    floor.enable_input_require_grads()
    model = get_peft_model(clone(base), config).train()
    model.enable_input_require_grads()
    difference = kept_bytes(model, batch) - kept_bytes(floor.train(), batch)
    return difference / (batch["input_ids"].numel() * 28)


@pytest.mark.parametrize(("dropout", "limit"), [(0.0, 1.2), (0.05, 0.5)])
def test_memory_beside_lora(dropout, limit, force):
    """Without dropout a fifth more than LoRA at most, with dropout half of it."""
    force("dense")
    base = tiny_llama(hidden_size=576, intermediate_size=1536)  # the share of what has rank size depends on them
    batch = {**token_batch(rows=4, length=64)}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    mixture = random_config(num_experts="2468", r=8, top_k=2, lora_dropout=dropout)
    assert adapted_bytes(mixture, batch, base) <= limit * adapted_bytes(lora, batch, base)


def test_few_operators():
    inputs = make_inputs((4, 16, 8), 6, torch.float32)
    with CountOperators() as forward:
        output = compute(Dense(), inputs).output
    with CountOperators() as backward:
        output.sum().backward()
    assert forward.operators <= 45
    assert backward.operators <= 60


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_cast_is_kept_for_the_backward_pass(dtype):
    """Adapters are too large to stay in a cache until then; what is in the dtype already is not kept twice."""
    inputs = make_inputs((5, 8), 4, dtype, params_dtype=torch.float32)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        compute(Dense(), inputs)
    sizes = sorted(tensor.numel() for tensor in kept if tensor.dtype == dtype and tensor.dim() == 2 and len(tensor) > 7)
    gated, matrix_B, joined = 12 * 5, 12 * 7, (12 + 4) * 8
    assert sizes == sorted([gated] if dtype == torch.float32 else [gated, matrix_B, joined])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])
def test_any_router_by_the_gradient_of_its_logarithm(top_k, fused, monkeypatch):
    monkeypatch.setitem(ROUTERS, "sigmoid", sigmoid_router)
    inputs = make_inputs((2, 9, 8), 4, torch.float32, top_k=top_k, fused=fused, dropout=True)
    plain = compute(Dense(), inputs).output
    inputs = inputs._replace(settings=inputs.settings._replace(router="sigmoid"))
    exact = in_float64(inputs)
    results = []
    for backend, each in ((Dense(), inputs), (Reference(), exact)):
        output, logits, _ = compute(backend, each)
        loss = output.double().sin().sum() + logits.double().square().sum()
        results.append([output, logits, *torch.autograd.grad(loss, leaves(each))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(results[0][0], plain, atol=1e-2)


def test_where_it_is_used(monkeypatch):
    inputs = make_inputs((5, 8), 4, torch.float32)
    assert Dense().why_unsupported(inputs) is Dense().why_slower(inputs) is None
    assert Dense().why_unsupported(inputs._replace(router=None)) == NO_ROUTER
    jittered = inputs._replace(settings=inputs.settings._replace(jitter=0.1))
    assert Dense().why_unsupported(jittered) == "the router's input is jittered"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert Dense().why_unsupported(inputs) == "a compiler is given plain operators"
