"""What is looked at before an earlier run is touched: schedules, batches, checkpoints; and what is asked for anew."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from transformers import GPT2Config, TrainerCallback, TrainerControl, TrainerState

from mola import TrainOptions, train
from mola.errors import MolaError
from mola.files.failures import lack_of_memory
from mola.training.callbacks import AveragedWeights, CheckpointLast, ResumedCheckpoints
from mola.training.checkpoints import checkpoints_in, rotate
from mola.training.interruption import Interruption
from mola.training.same_run import _samples_per_step
from mola.training.schedule import goes_on_with_found_batch
from mola.training.trainer import _multiple
from tests.grids import slow
from tests.versions import has


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"min_lr": 1e-5}'}, "cosine cannot be made with"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be made with"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay cannot be made with"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "validation_size": None}, "goes by the evaluation loss"),
        ({"eval_on_start": "true", "validation_size": None}, "`eval_on_start` needs evaluation data"),
    ],
)
def test_schedules_that_cannot_be_are_refused_before_an_earlier_run_is_removed(
    options, message, flags, tmp_path, error_line
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "finished", "settings": {}}', encoding="utf-8")
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert message in error_line(flags(**options, overwrite_output_dir="true"))
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_only_a_runs_own_checkpoints_are_removed(tmp_path):
    for name in ("1", "2", "10", "4", "2-good", "keep-3", "notes"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{n}" for n in (10, 4, 2, 1)]
    rotate(tmp_path, 3, str(tmp_path / "checkpoint-1"))
    others = {"checkpoint-2-good", "checkpoint-keep-3", "checkpoint-notes"}
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-10", "checkpoint-4", "checkpoint-1"} | others
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-1"} | others
    rotate(tmp_path, None, None)
    assert len(checkpoints_in(tmp_path)) == 2


@pytest.fixture
def options_of(tiny_model_dir, rows_file, tmp_path):
    """Options of a run of four steps in Python; those given extend them."""

    def build(**more):
        places = {"base_model": tiny_model_dir, "data": rows_file, "output_dir": tmp_path / "run"}
        values = {"num_experts": "2,", "r": "2", "max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0}
        values |= {"use_cpu": True, "disable_tqdm": True, **more}
        return TrainOptions(**{name: str(place) for name, place in places.items()}, **values)

    return build


class KeepsACopy(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 1:
            shutil.copytree(self.folder / "checkpoint-1", self.folder / "checkpoint-1-good")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"accelerator_config": {"split_batches": True}}, "shares one batch"),
        ({"accelerator_config": {"even_batches": False}}, "other numbers of steps"),
        ({"accelerator_config": {"dispatch_batches": True}}, "batches of one length"),
        ({"label_smoothing_factor": 0.1, "use_liger_kernel": True}, "needs logits"),
        ({"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, None),
    ],
    ids=str,
)
def test_what_the_trainer_would_compute_wrongly(wrong, reason, options_of, monkeypatch):
    monkeypatch.setattr("mola.training.option_checks.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(TrainOptions, "world_size", 2)
    reason = "newer version" if reason is None and not has("transformers", "5.16") else reason
    with nullcontext() if reason is None else pytest.raises(MolaError, match=reason):
        options_of(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr_scheduler_type": "cosin"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"activation_checkpointing_kwargs": "use_reentrant=false"},
    ],
    ids=str,
)
def test_wrong_choices_of_the_trainer_are_errors_of_ours(wrong, options_of):
    ((name, value),) = wrong.items()
    if not hasattr(TrainOptions, name):
        pytest.skip(f"this version of Transformers has no {name}")
    with pytest.raises(MolaError, match=value):
        options_of(**wrong)


@pytest.mark.parametrize("limit", [1, *slow(2)])
def test_a_copy_of_a_checkpoint_stays(limit, options_of, tmp_path):
    options = options_of(
        save_strategy="steps",
        save_steps=1,
        save_total_limit=limit,
        eval_strategy="steps",
        eval_steps=1,
        validation_size=2,
    )
    result = train(options, [KeepsACopy(tmp_path / "run")])
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    best = Path(result.best_checkpoint).name
    other = "checkpoint-3" if best == "checkpoint-4" else "checkpoint-4"
    assert left == {"checkpoint-1-good", best} | ({other} if limit == 2 else set())
    saved = torch.load(tmp_path / "run" / best / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == limit


def test_a_resumed_run_logs_evaluates_and_saves_as_it_is_asked_to_now(tmp_path):
    state = TrainerState(logging_steps=500, eval_steps=500, save_steps=500, max_steps=40)
    asked = {"logging_steps": 2, "eval_steps": 0.25, "save_steps": 10}
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, save_total_limit=None, **asked)
    ResumedCheckpoints(tmp_path).on_train_begin(args, state, TrainerControl())
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (2, 10, 10)


def test_a_run_goes_on_with_the_batch_that_fitted(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"train_batch_size": 4}), encoding="utf-8")
    for asked, found in ((8, 4), (2, 4), (4, 4)):
        options = SimpleNamespace(per_device_train_batch_size=asked)
        goes_on_with_found_batch(options, tmp_path)
        assert options.per_device_train_batch_size == found


def test_a_second_signal_stops_at_once(caplog):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interruption = Interruption()
    interruption.on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl())
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received == signal.SIGINT
        assert "Once more stops at once, without saving" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interruption.restore()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


class SignalInEvaluation(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
            signal.raise_signal(signal.SIGTERM)
            self.on_prediction_step = lambda *given, **more: None  # a second one would end the process


def test_no_step_follows_an_evaluation_in_which_a_signal_came(options_of, tmp_path):
    how = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch", "load_best_model_at_end": False}
    result = train(options_of(validation_size=1, logging_steps=1, **how), [SignalInEvaluation()])
    assert result.status == "interrupted"
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-2"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert max(entry["step"] for entry in found) == 2
    assert [entry["step"] for entry in found if "eval_loss" in entry] == [2], "what it measured is kept"


def test_a_signal_before_the_first_step_waits_for_it():
    interruption, control = Interruption(), TrainerControl()
    interruption.received = 15
    args = SimpleNamespace(world_size=1, save_total_limit=None, save_strategy="epoch")
    interruption.on_evaluate(args, TrainerState(global_step=0), control)
    assert not control.should_save
    assert not control.should_training_stop
    interruption.on_evaluate(args, TrainerState(global_step=1), control)
    assert control.should_save
    assert control.should_training_stop


def test_a_step_is_saved_once():
    last, control = CheckpointLast(), TrainerControl(should_save=True, should_training_stop=True)
    state = TrainerState(global_step=4, epoch=1.0)
    last.on_step_end(None, state, control)
    last.on_save(None, state, control)  # a signal in the evaluation after the step
    control.should_save = True  # as the trainer's own callback asks at the end of an epoch
    last.on_epoch_end(None, state, control)
    assert not control.should_save


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    interruption = Interruption()
    try:
        interruption.on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        interruption.restore()
        signal.signal(signal.SIGINT, before)


def test_no_token_is_saved_with_a_checkpoint(options_of, tmp_path):
    train(options_of(save_strategy="steps", save_steps=4, eval_strategy="no", hub_token="hf_secret"))
    assert b"hf_secret" not in (tmp_path / "run" / "checkpoint-4" / "training_args.bin").read_bytes()


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    interruption = Interruption()
    args = SimpleNamespace(world_size=2, ddp_timeout=1)
    monkeypatch.setattr(distributed, "new_group", lambda **options: None)
    monkeypatch.setattr(distributed, "all_reduce", lambda *given, **options: interruption._handle(15, None))
    interruption.share(args)
    assert (interruption.signal_number, interruption.received) == (None, 15)
    monkeypatch.setattr(distributed, "all_reduce", lambda *given, **options: None)
    interruption.share(args)
    assert interruption.signal_number == 15


@pytest.mark.parametrize(("cutoff_len", "multiple"), [(96, 8), (97, None), (100, None)])
def test_padding_ends_at_the_last_position(cutoff_len, multiple):
    model = SimpleNamespace(config=GPT2Config(n_positions=100))
    assert _multiple(SimpleNamespace(cutoff_len=cutoff_len), model) == multiple


def test_samples_per_step_are_those_of_the_batch_that_was_found(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"train_batch_size": 3}), encoding="utf-8")
    settings = {"auto_find_batch_size": True, "gradient_accumulation_steps": 2}
    before = {"effective_batch_size": 16, "processes": 2, "settings": settings}
    assert _samples_per_step(before, tmp_path) == 12
    assert _samples_per_step({**before, "settings": {}}, tmp_path) == 16


@pytest.mark.parametrize(("step", "is_evaluated"), [(14, False), (15, True)])
def test_the_last_step_of_a_run_is_evaluated_though_a_signal_came(step, is_evaluated):
    interruption = Interruption()
    interruption.signal_number = 15
    state = TrainerState(epoch=step / 10, global_step=step, max_steps=15)
    control = interruption.on_epoch_end(SimpleNamespace(), state, TrainerControl(should_evaluate=True))
    assert control.should_evaluate is is_evaluated


@pytest.mark.parametrize("asked", [{}, {"should_save": True}, {"should_training_stop": True}], ids=str)
def test_optimizers_that_train_other_weights_are_asked_for_those_that_count(asked):
    calls = []
    optimizer = SimpleNamespace(eval=lambda: calls.append("eval"))
    AveragedWeights().on_step_end(None, TrainerState(), TrainerControl(**asked), optimizer=optimizer)
    AveragedWeights().on_step_end(None, TrainerState(), TrainerControl(**asked), optimizer=object())
    assert calls == (["eval"] if asked else [])


def test_weights_of_a_schedule_free_optimizer_are_its_averages(options_of, tmp_path):
    pytest.importorskip("schedulefree", reason="needs schedulefree")
    found = {}

    class Looks(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, model=None, **kwargs):
            found["trains"] = [group["train_mode"] for group in optimizer.param_groups]
            found["weights"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    options = options_of(
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        eval_strategy="no",
        save_strategy="no",
        warmup_steps=0.1,
    )
    train(options, [Looks()])
    assert options.warmup_steps == 0.1, "those of the caller stay"
    assert not any(found["trains"])
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["warmup_steps"] == 1, "a share of the steps is none that this optimiser knows"
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for name, tensor in found["weights"].items():
        assert torch.equal(saved[name.replace(".default", "")], tensor)


@pytest.mark.parametrize(
    "text", ["Evaluation hit an out-of-memory error. Lower it.", "No executable batch size found, reached zero."]
)
def test_searches_for_a_batch_that_end_without_one_are_lack_of_memory(text):
    assert lack_of_memory(RuntimeError(text)) == "no memory left"
    assert lack_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried")) is not None
