"""Use of experts: against the definitions, over batches, with masks, and for experts that are made to be dead."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig, MolaError, MolaLinear
from mola.insight.recorder import ModuleGates, recorded_gates, router_entropies
from mola.insight.usage import UsageCounter
from mola.tuner.routing import dense_gates, top_k_softmax


def gates(num_tokens, num_experts, top_k, seed):
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return dense_gates(top_k_softmax(logits, top_k), num_experts), router_entropies(logits, dim=1)


@given(st.integers(1, 20), st.integers(2, 6), st.data(), st.integers(0, 2**31))
def test_usage_equals_its_definitions_for_any_batches(num_tokens, num_experts, data, seed):
    top_k = data.draw(st.integers(1, num_experts))
    cut = data.draw(st.integers(0, num_tokens))
    all_gates, entropies = gates(num_tokens, num_experts, top_k, seed)
    counter = UsageCounter()
    for part in (slice(cut), slice(cut, None)):
        counter.add([ModuleGates("layers.3.q_proj", 3, all_gates[part], entropies[part])])
    [usage] = counter.usage()
    rows = all_gates.tolist()
    assert (usage.module, usage.layer_index, usage.num_tokens) == ("layers.3.q_proj", 3, num_tokens)
    for expert in range(num_experts):
        column = [row[expert] for row in rows]
        assert usage.shares[expert] == pytest.approx(sum(value > 0 for value in column) / num_tokens)
        assert usage.mean_gates[expert] == pytest.approx(sum(column) / num_tokens)
        assert (expert in usage.dead_experts) == (max(column) == 0)
    assert sum(usage.shares) == pytest.approx(top_k)
    assert sum(usage.mean_gates) == pytest.approx(1)
    entropy = -sum(mean * math.log(mean) for mean in usage.mean_gates if mean > 0)
    assert usage.balance == pytest.approx(entropy / math.log(num_experts))
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).double()
    all_entropies = torch.distributions.Categorical(logits=logits).entropy() / math.log(num_experts)
    assert usage.entropy == pytest.approx(all_entropies.mean().item(), abs=1e-6)
    ordered = [sorted(row, reverse=True) for row in rows]
    assert usage.margin == pytest.approx(sum(row[0] - row[1] for row in ordered) / num_tokens)
    effective = [1 / sum(gate**2 for gate in row) for row in rows]
    assert usage.effective_experts == pytest.approx(sum(effective) / num_tokens)
    assert usage.first_gate_above == sum(max(row) > 0.9 for row in rows) / num_tokens


def test_masked_tokens_do_not_count():
    (all_gates, entropies), mask = gates(6, 4, 2, 0), torch.tensor([[1, 0, 1], [0, 0, 1]])
    masked, left = UsageCounter(), UsageCounter()
    masked.add([ModuleGates("q_proj", 0, all_gates, entropies)], mask)
    left.add([ModuleGates("q_proj", 0, all_gates[[0, 2, 5]], entropies[[0, 2, 5]])])
    assert masked.usage() == left.usage()


@pytest.mark.parametrize("mask", [None, torch.zeros(6)])
def test_nothing_counted_is_an_error(mask):
    counter = UsageCounter()
    counter.add([] if mask is None else [ModuleGates("q_proj", 0, *gates(6, 4, 2, 0))], mask)
    with pytest.raises(MolaError, match="no token was counted"):
        counter.usage()


def test_experts_that_a_model_never_chooses(tiny_model_dir):
    torch.manual_seed(0)
    config = MolaConfig(num_experts=4, top_k=2, r=2, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).eval()
    for module in model.modules():
        if isinstance(module, MolaLinear) and module.layer_index == 2:
            # Of equal logits the first are chosen: experts 2 and 3 never are.
            torch.nn.init.zeros_(module.mola_router["default"])
    counter = UsageCounter()
    ids = torch.randint(2, 250, (2, 4, 40), generator=torch.Generator().manual_seed(0))
    for batch in ids:
        with recorded_gates(model) as recorded, torch.no_grad():
            model(batch)
        counter.add(recorded)
    usages = counter.usage()
    assert [usage.num_tokens for usage in usages] == [320] * (4 * 7)
    assert {usage.dead_experts for usage in usages if usage.layer_index == 2} == {(2, 3)}
    assert all(usage.dead_experts == () for usage in usages if usage.module.endswith("0.self_attn.q_proj"))
    assert {usage.balance for usage in usages if usage.layer_index == 2} == {0.5}  # two of four, evenly
