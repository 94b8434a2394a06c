"""`--packing`: several samples in one row, which do not see each other."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, MambaConfig, MambaForCausalLM

from mola import MolaConfig, MolaError, load_tokenizer
from mola.cli import main
from mola.data.tokenized import IGNORED
from mola.training.packing import PackedBatches, check_packing, pack_samples
from tests.training.runs import NO_EVALUATION, losses, read_record


def samples_of(lengths):
    ids = [[100 * (number + 1) + position for position in range(length)] for number, length in enumerate(lengths)]
    labels = [[IGNORED, *each[1:]] for each in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


@given(st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_each_sample_is_whole_in_one_row(lengths):
    dataset = samples_of(lengths)
    packed = pack_samples(dataset, 16)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == row["length"] <= 16
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], row["length"]], strict=True):
            found.append(row["input_ids"][start:end])
            assert row["labels"][start:end] == [IGNORED, *found[-1][1:]]
            assert row["position_ids"][start:end] == list(range(end - start))
    assert sorted(found) == sorted(dataset["input_ids"])
    assert len(packed) < max(2, 2 * sum(lengths) / 16 + 1)  # at most one row is half empty


@pytest.mark.parametrize("has_one_row", [False, True])
def test_loss_and_gradients_are_those_of_the_samples_apart(tiny_model_dir, has_one_row):
    tokenizer = load_tokenizer(tiny_model_dir, "right")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    config = MolaConfig(
        num_experts="2468",
        r=4,
        lora_dropout=0.0,
        router_aux_loss_coef=0.1,
        router_z_loss_coef=0.1,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.train(), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "mola_B" in name:
            parameter.data.normal_(std=0.1)
    ids = [torch.randint(3, 200, (length,)).tolist() for length in (5, 9, 3, 12, 7)]
    dataset = datasets.Dataset.from_dict({"input_ids": ids, "labels": [[IGNORED] * 2 + each[2:] for each in ids]})
    apart = DataCollatorForSeq2Seq(tokenizer)
    together = PackedBatches(apart, tokenizer.pad_token_id, has_one_row)
    results = []
    for batch in (apart(list(dataset)), together(list(pack_samples(dataset, 16)))):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
    assert together(list(dataset))["input_ids"].shape == apart(list(dataset))["input_ids"].shape
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_run_has_the_loss_of_the_run_without_packing(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    options = {**NO_EVALUATION, "warmup_steps": 0, "lora_dropout": 0, "num_train_epochs": 1, "cutoff_len": 256}
    assert main(flags(tmp_path / "apart", **options, per_device_train_batch_size=1000)) == 0
    assert main([*flags(tmp_path / "packed", **options, per_device_train_batch_size=1000), "--packing"]) == 0
    assert "Packed into " in caplog.text
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "apart"), rel=1e-5)
    assert read_record(tmp_path / "packed")["settings"]["packing"] is True


def test_a_model_with_a_recurrent_state_is_refused():
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    model = get_peft_model(MambaForCausalLM(config), LoraConfig(r=2, target_modules=["in_proj"]))
    with pytest.raises(MolaError, match="`packing` does not work with MambaForCausalLM"):
        check_packing(model, None)
