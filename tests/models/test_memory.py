"""The estimate of memory beside torch's own count: bytes of tensors that autograd saves, of weights and optimiser."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig, MolaLinear
from mola.models.memory import AdaptedLinear, serving_memory, training_memory
from mola.models.options import PlanOptions
from mola.models.plan import plan
from tests.ecosystem.families import FAMILIES

SMOLLM2 = Path(__file__).resolve().parents[2] / ".cache" / "SmolLM2-135M-Instruct"
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def adapted(folder, itemsize, **settings):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[itemsize])
    model = get_peft_model(base, MolaConfig(**{"num_experts": "2468", "r": 4, **settings, "task_type": "CAUSAL_LM"}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def saved_bytes(model, batch_size, length):
    """Bytes that autograd keeps in one forward pass, weights and inputs left out."""
    ids = torch.randint(3, 200, (batch_size, length))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0  # padding, so that the attention gets a mask
    own = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers(), ids, mask)}
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    dtype = next(model.get_base_model().parameters()).dtype
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    return sum(each.untyped_storage().nbytes() for key, each in found.items() if key not in own), loss


def estimate(model, batch_size, length, itemsize, **more):
    linears = [
        AdaptedLinear(layer.num_experts["default"], layer.r["default"], layer.in_features)
        for layer in model.modules()
        if isinstance(layer, MolaLinear)
    ]
    trainable = model.get_nb_trainable_parameters()[0]
    weights = sum(each.nbytes for each in model.parameters() if not each.requires_grad)
    return training_memory(
        model.config,
        linears,
        weight_bytes=weights,
        trainable_parameters=trainable,
        itemsize=itemsize,
        batch_size=batch_size,
        length=length,
        **more,
    )


def compare_saved(model, batch_size, length, itemsize):
    """The estimate of what autograd saves, relative to what it saves."""
    memory = estimate(model, batch_size, length, itemsize)
    saved, _ = saved_bytes(model, batch_size, length)
    copies = memory.adapter - 4 * model.get_nb_trainable_parameters()[0]
    probabilities = 4 * batch_size * length * model.config.vocab_size
    return (memory.activations + copies + probabilities) / saved


@pytest.mark.parametrize(("itemsize", "dropout"), [(4, 0.0), (2, 0.0)])
def test_activations_are_those_that_autograd_saves(tiny_model_dir, force, itemsize, dropout):
    force("dense")  # native functions need no copies of the experts in half precision
    model = adapted(tiny_model_dir, itemsize, lora_dropout=dropout)
    assert compare_saved(model, 3, 40, itemsize) == pytest.approx(1, abs=0.03)


def test_one_expert_keeps_its_dropped_input(tiny_model_dir):
    model = adapted(tiny_model_dir, 4, num_experts=1, lora_dropout=0.1)
    assert compare_saved(model, 3, 40, 4) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("itemsize", [4, 2])
def test_weights_gradients_and_optimizer_are_those_of_the_model(tiny_model_dir, itemsize):
    model = adapted(tiny_model_dir, itemsize)
    memory = estimate(model, 1, 8, itemsize)
    _, loss = saved_bytes(model, 1, 8)
    loss.backward()
    trained = [each for each in model.parameters() if each.requires_grad]
    assert memory.gradients == sum(each.grad.nbytes for each in trained)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in state.values() if each.dim()]
    assert memory.optimizer == sum(each.nbytes for each in states)
    planned = plan(
        PlanOptions(str(tiny_model_dir), "2468", "4", dtype=str(DTYPES[itemsize])[6:], batch_size=1, cutoff_len=8)
    )
    expected = {name: getattr(memory, name) for name in ("weights", "adapter", "gradients", "optimizer", "activations")}
    assert {name: planned.memory["training"][name] for name in expected} == expected
    assert planned.memory["training"]["total"] == memory.total


def test_cache_is_that_of_the_model(tiny_model_dir, loaded_tiny_model):
    cache = loaded_tiny_model(torch.zeros(3, 10, dtype=torch.long), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    sizes = {"weight_bytes": 0, "trainable_parameters": 0, "itemsize": 4, "batch_size": 3, "length": 10}
    assert serving_memory(loaded_tiny_model.config, **sizes).cache == stored


def test_options_that_need_less(tiny_model_dir):
    model = adapted(tiny_model_dir, 4)
    whole = estimate(model, 4, 64, 4)
    assert estimate(model, 4, 64, 4, checkpointing=True).activations < whole.activations / 2
    assert estimate(model, 4, 64, 4, logit_positions=16).logits == whole.logits / 4
    assert estimate(model, 4, 64, 4, logit_positions=999).logits == whole.logits
    assert [estimate(model, 4, 64, 4, optimizer=name).optimizer for name in ("adamw_8bit", "sgd")] == [
        whole.optimizer / 4,
        0,
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_an_estimate(family):
    """Configurations name sizes differently, or have one for each layer."""
    config = getattr(transformers, FAMILIES[family].config)(**FAMILIES[family].options)
    shape = {"weight_bytes": 1, "trainable_parameters": 1, "itemsize": 2, "batch_size": 2, "length": 4}
    assert training_memory(config, [], **shape).activations > 0
    assert serving_memory(config, **shape).total > 0


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs the SmolLM2 weights that `make quickstart` converts")
@pytest.mark.parametrize("itemsize", [4, 2])
def test_activations_of_smollm2(force, itemsize):
    force("dense")
    assert compare_saved(adapted(SMOLLM2, itemsize, r=8), 4, 128, itemsize) == pytest.approx(1, abs=0.02)
