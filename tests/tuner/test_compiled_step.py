"""Whole training steps under `torch.compile`: one graph, the eager gradients, no graph per batch."""

import pytest
import torch
from peft import get_peft_model

from mola import MolaLinear

from ..grids import slow
from .models import clone, random_config, tiny_llama, token_batch

BACKEND = "aot_eager"  # graphs are made as for any backend, without waiting for a C++ compiler
LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
LAYER_LOSS = {"router_aux_loss_coef": 0.1, "router_aux_loss_reduction": "layer"}
SKIP_SIDE_EFFECTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make(dtype=torch.float32, checkpointing=False, **options):
    """A layer with experts in attention and MLP; few linears, because every one takes time to compile."""
    config = random_config(**{"num_experts": "4", "target_modules": ["q_proj", "down_proj"], **options})
    model = get_peft_model(tiny_llama(num_layers=1).to(dtype), config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # Transformers makes the embeddings ask for a gradient in place: no graph can hold that, nobody needs it.
        model.disable_input_require_grads()
    return model


def step(forward, model, batch, autocast=False):
    """Loss and gradients."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = forward(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compiled(model, dynamic=None):
    """The whole forward; a graph break is an error."""
    return torch.compile(model, backend=BACKEND, fullgraph=True, dynamic=dynamic)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("losses", "checkpointing"),
    [
        ({}, False),
        (LOSSES, True),
        *slow(({}, True), (LOSSES, False), *((LAYER_LOSS, checkpointing) for checkpointing in (False, True))),
    ],
)
def test_one_graph_with_the_eager_gradients(losses, checkpointing):
    model, batch = make(checkpointing=checkpointing, **losses), token_batch(padding=2)
    again = clone(model)
    expected_loss, expected = step(model, model, batch)
    with torch._dynamo.config.patch({SKIP_SIDE_EFFECTS: True} if losses and checkpointing else {}):
        loss, ours = step(compiled(again), again, batch)
    assert graphs() == 1
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)
    if losses:
        torch.testing.assert_close(again.get_balance_loss(), model.get_balance_loss())
    # What was compiled is a wrapper: the model itself computes as before, to the last bit.
    assert "forward" not in again.__dict__
    assert step(again, again, batch)[0] == expected_loss


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_under_autocast(dtype):
    # As many experts as are used: where there is a choice, bfloat16 may make another one.
    model, batch = make(dtype=dtype, num_experts="2", top_k=2, **LOSSES), token_batch(padding=2)
    again = clone(model)
    _, expected = step(model, model, batch, autocast=True)
    _, ours = step(compiled(again), again, batch, autocast=True)
    assert graphs() == 1
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() < 0.05 * gradient.norm(), name
    outputs = [module.router_outputs["default"] for module in again.modules() if isinstance(module, MolaLinear)]
    assert {output.logits.dtype for output in outputs} == {torch.float32}


@pytest.mark.slow
def test_dropout_is_drawn_anew_in_one_graph():
    model, batch = make(lora_dropout=0.05), token_batch(padding=2)
    forward = compiled(model)
    losses = [step(forward, model, batch)[0] for _ in range(3)]
    assert graphs() == 1
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [pytest.param(None, 2, id="automatic"), pytest.param(True, 1, id="dynamic")],
)
@pytest.mark.slow
def test_graphs_do_not_grow_with_the_lengths_of_batches(dynamic, expected):
    """By itself torch makes one graph for the first length and one for all others."""
    model = make(lora_dropout=0.05)
    forward = compiled(model, dynamic)
    for length in (16, 24, 8, 32, 8, 24, 32, 16):
        step(forward, model, token_batch(length=length, padding=3))
    assert graphs() == expected


@pytest.mark.slow
def test_router_losses_need_no_second_graph():
    model, batch = make(**LOSSES), token_batch(padding=2)
    forward = compiled(model)
    for _ in range(3):
        step(forward, model, batch)
    assert graphs() == 1
