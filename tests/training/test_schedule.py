"""What is looked at before an earlier run is touched: schedules, batches, checkpoints; and what is asked for anew."""

import json
import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from transformers import GPT2Config, TrainerCallback, TrainerControl, TrainerState

from mola import TrainOptions, train
from mola.cli import main
from mola.errors import MolaError
from mola.files.failures import memory_error_reason
from mola.training.callbacks import AveragedWeights, CheckpointLast, ResumedRun
from mola.training.checkpoints import checkpoints_in, step_in_name
from mola.training.interruption import Interruption
from mola.training.trainer import _padding
from tests.training.runs import NO_EVALUATION, read_record
from tests.versions import has


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"min_lr": 1e-5}'}, "cosine cannot be made with"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be made with"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay cannot be made with"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "validation_size": None}, "follows the evaluation loss"),
        ({"optim": "lomo"}, "`optim`"),
    ],
)
def test_schedules_that_cannot_be_are_refused_before_an_earlier_run_is_removed(
    options, message, flags, tmp_path, error_line
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "finished", "settings": {}}', encoding="utf-8")
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert message in error_line(flags(**options, overwrite="true"))
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_steps": 1}, "Warm-up of 1 steps in a run of 1: shortened to 0."),
        ({"max_steps": 4, "warmup_steps": 100}, "Warm-up of 100 steps in a run of 4: shortened to 1."),
    ],
)
def test_a_warm_up_that_does_not_fit_is_shortened(options, line, flags, tmp_path, caplog):
    assert main(flags(**options, **NO_EVALUATION)) == 0
    assert line in caplog.messages
    assert read_record(tmp_path / "run")["steps"] == options["max_steps"]


@pytest.fixture
def options_of(tiny_model_dir, rows_file, tmp_path):
    """Options of a run of four steps in Python; those given extend them."""

    def build(**more):
        places = {"base_model": tiny_model_dir, "data": rows_file, "output_dir": tmp_path / "run"}
        values = {"num_experts": "2,", "r": "2", "max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0}
        values |= {"use_cpu": True, "disable_tqdm": True, **more}
        return TrainOptions(**{name: str(place) for name, place in places.items()}, **values)

    return build


def test_label_smoothing_averages_over_accumulated_batches(options_of):
    smoothed = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    old = not has("transformers", "5.16")
    with pytest.raises(MolaError, match="needs Transformers 5.16") if old else nullcontext():
        options_of(**smoothed)


def test_a_batch_size_is_looked_for_in_one_process_only(options_of, monkeypatch):
    options_of(auto_find_batch_size=True)
    monkeypatch.setattr(TrainOptions, "world_size", 2)
    with pytest.raises(MolaError, match="`auto_find_batch_size` works in one process only.* Got 2 processes"):
        options_of(auto_find_batch_size=True)


@pytest.mark.skipif(not hasattr(TrainOptions, "train_sampling_strategy"), reason="this Transformers has no such option")
def test_an_order_of_samples_that_no_resumed_run_could_repeat_is_refused(options_of):
    with pytest.raises(MolaError, match="batch_rebalance has no seed"):
        options_of(train_sampling_strategy="batch_rebalance")


def test_resumed_run_has_the_intervals_of_its_new_options(tmp_path):
    state = TrainerState(logging_steps=500, eval_steps=500, save_steps=500, max_steps=40)
    asked = {"logging_steps": 2, "eval_steps": 0.25, "save_steps": 10}
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, save_total_limit=None, **asked)
    ResumedRun(tmp_path).on_train_begin(args, state, TrainerControl())
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (2, 10, 10)


def test_a_second_signal_stops_at_once(caplog):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interruption = Interruption()
    interruption.on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl())
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received_here == signal.SIGINT
        assert "A second signal stops at once, without saving" in caplog.text
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


class SecondIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - 2)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [4]),
        ({"validation_size": 1}, [2]),  # whose weights are the result
        ({"save_total_limit": 2}, [4, 3]),
        ({"save_total_limit": 0}, [4, 3, 2, 1]),
    ],
    ids=["last", "best", "two", "all"],
)
def test_a_finished_run_keeps_one_checkpoint_unless_more_are_asked_for(options_of, tmp_path, options, kept):
    one_step = {"save_strategy": "epoch", "per_device_train_batch_size": 16}  # in each of four epochs
    result = train(options_of(**one_step, **options), [SecondIsBest()])
    assert [step_in_name(path) for path in checkpoints_in(tmp_path / "run")] == kept
    assert result.best_checkpoint in (None, str(tmp_path / "run" / f"checkpoint-{kept[0]}"))


def test_a_signal_before_the_first_step_waits_for_it():
    interruption, control = Interruption(), TrainerControl()
    interruption.received_here = 15
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
    interruption.share_signal(args)
    assert (interruption.shared_signal, interruption.received_here) == (None, 15)
    monkeypatch.setattr(distributed, "all_reduce", lambda *given, **options: None)
    interruption.share_signal(args)
    assert interruption.shared_signal == 15


@pytest.mark.parametrize(("cutoff_len", "multiple"), [(96, 8), (97, None)])
def test_padding_ends_at_the_last_position(cutoff_len, multiple):
    model = SimpleNamespace(config=GPT2Config(n_positions=100))
    assert _padding(SimpleNamespace(cutoff_len=cutoff_len), model) == multiple


@pytest.mark.parametrize(("step", "is_evaluated"), [(14, False), (15, True)])
def test_the_last_step_of_a_run_is_evaluated_though_a_signal_came(step, is_evaluated):
    interruption = Interruption()
    interruption.shared_signal = 15
    state, control = TrainerState(epoch=step / 10, global_step=step, max_steps=15), TrainerControl(should_evaluate=True)
    interruption.on_epoch_end(SimpleNamespace(), state, control)
    assert control.should_evaluate is is_evaluated


@pytest.mark.parametrize("asked", [{}, {"should_save": True}, {"should_training_stop": True}], ids=str)
def test_averaged_weights_are_used_when_the_run_saves_or_stops(asked):
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
def test_failed_search_for_a_batch_size_is_lack_of_memory(text):
    assert memory_error_reason(RuntimeError(text)) == "no memory left"
    assert memory_error_reason(torch.OutOfMemoryError("CUDA out of memory. Tried")) is not None
