"""Bases quantised with something else than bitsandbytes: their layers are called as they are."""

import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TorchAoConfig

from mola import MolaConfig, MolaError, load_model
from mola.models.quantization import prepare_for_training

pytestmark = [pytest.mark.quant, pytest.mark.filterwarnings("ignore::FutureWarning")]
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="needs torchao, which no extra of mola installs")


def test_torchao(torchao, blocks_dir, tmp_path, caplog):
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(blocks_dir, quantization_config=config, device_map={"": "cpu"})
    base.save_pretrained(tmp_path / "base")
    for file in blocks_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(prepare_for_training(base), MolaConfig(num_experts="2-4", r=4, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        again = load_model(tmp_path / "base", tmp_path / "adapter", "float32", "cpu")
        assert torch.equal(again(input_ids=IDS).logits, expected)
    assert "quantised with torchao" in caplog.text


def test_merging_into_a_torchao_base_is_refused(torchao, blocks_dir):
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(blocks_dir, quantization_config=config, device_map={"": "cpu"})
    model = get_peft_model(base, MolaConfig(num_experts=1, r=4, task_type="CAUSAL_LM"))
    with pytest.raises(MolaError, match="without quantisation"):
        model.merge_and_unload()
