"""Logits only where the next token is trained: the same losses and gradients, less to compute."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from mola.cli import main
from mola.training.needed_logits import NeededLogits, computes_needed_logits, needed_logits
from mola.training.options import TrainOptions
from tests.training.runs import WEIGHTS, losses, read_metrics
from tests.tuner.models import random_config, tiny_llama, token_batch


@pytest.fixture
def options(tmp_path):
    def make(**settings):
        return TrainOptions(base_model="a/b", output_dir=str(tmp_path), use_cpu=True, dtype="float32", **settings)

    return make


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_every_trained_token_is_there_once(trained):
    labels = torch.arange(5 * len(trained)).view(-1, 5).masked_fill(~torch.tensor(trained), -100)
    found = needed_logits(labels)
    wanted = labels[:, 1:]  # nothing predicts the first
    if not (wanted >= 0).any():
        assert found == {}
        return
    assert sorted(found["shift_labels"][found["shift_labels"] >= 0]) == sorted(wanted[wanted >= 0])
    for place, column in zip(found["logits_to_keep"], found["shift_labels"].t(), strict=True):
        assert (column >= 0).any()
        assert torch.equal(column, labels[:, place + 1])


@pytest.mark.parametrize(("num_items", "reduction"), [(None, "module"), (11, "layer")])
def test_losses_and_gradients_are_the_same(num_items, reduction):
    settings = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "router_aux_loss_reduction": reduction}
    model = get_peft_model(tiny_llama(), random_config(**settings)).train()
    batch = token_batch(padding=3, prompt=5)
    more = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    found = []
    for kept in ({}, needed_logits(batch["labels"])):
        model.zero_grad()
        output = model(**batch, **kept, **more)
        output.loss.backward()
        found.append((output, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]))
    (every, gradients), (needed, others) = found
    torch.testing.assert_close(needed.loss, every.loss)
    assert needed.logits.shape[1] == 4  # of 9: those before the last four tokens
    assert every.logits.shape[1] == 9
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(two, one)


def test_models_with_needed_logits(options):
    model = get_peft_model(tiny_llama(), random_config()).train()
    before = torch.get_rng_state()
    assert computes_needed_logits(model, options())
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert computes_needed_logits(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)), options())


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` reads them"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` reads them"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches cuts a batch"),
    ],
)
def test_options_that_need_all_logits(setting, reason, options, caplog):
    with caplog.at_level("INFO"):
        assert not computes_needed_logits(tiny_llama(), options(**setting))
    assert reason in caplog.text


def test_models_without_needed_logits(options, caplog):
    class NoSuchArgument(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama()

        def forward(self, input_ids, labels=None):
            return self.model(input_ids, labels=labels)

    class OwnLoss(NoSuchArgument):
        """A loss of all logits: with some of them it fails, or is another one."""

        def __init__(self, share):
            super().__init__()
            self.share = share

        def forward(self, input_ids, labels=None, shift_labels=None, logits_to_keep=0):
            output = self.model(input_ids, logits_to_keep=logits_to_keep)
            if self.share:
                output.loss = output.logits.mean()
            else:
                output.loss = torch.nn.functional.cross_entropy(output.logits[0], labels[0])
            return output

    cases = [
        (NoSuchArgument(), "NoSuchArgument has no `logits_to_keep`"),
        (OwnLoss(share=False), "OwnLoss fails with fewer logits: "),
        (OwnLoss(share=True), "OwnLoss has a different loss with fewer logits"),
    ]
    for model, reason in cases:
        with caplog.at_level("INFO"):
            assert not computes_needed_logits(model, options())
        assert reason in caplog.text


@pytest.mark.parametrize(("prompt", "added"), [(3, {"logits_to_keep", "shift_labels"}), (9, set())])
def test_batches_without_a_trained_token_stay_as_they_are(prompt, added):
    batch = token_batch(prompt=prompt)
    assert NeededLogits(lambda samples: dict(samples))(batch).keys() == batch.keys() | added


def test_run_with_needed_logits_ends_with_the_same_weights(flags, tmp_path, monkeypatch):
    positions = []
    forward = torch.nn.functional.cross_entropy

    def watch(logits, *rest, **options):
        positions.append(len(logits))
        return forward(logits, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watch)
    settings = {"num_experts": "1224", "validation_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3}
    assert main(flags(tmp_path / "needed", **settings)) == 0
    counts = [list(positions)]
    positions.clear()
    monkeypatch.setattr("mola.training.trainer.computes_needed_logits", lambda *_: False)
    assert main(flags(tmp_path / "all", **settings)) == 0
    counts += [list(positions)]
    assert sum(counts[0]) < 0.9 * sum(counts[1])
    found, expected = losses(tmp_path / "needed"), losses(tmp_path / "all")
    assert found == pytest.approx(expected, rel=1e-4)
    last, other = (read_metrics(tmp_path / name)[-1] for name in ("needed", "all"))
    assert last["step"] == other["step"] == 3
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("needed", "all"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-2, atol=1e-3)
