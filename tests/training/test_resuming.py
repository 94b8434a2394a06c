"""Runs that are interrupted, resumed or overwritten, and what survives that."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from mola.cli import main
from mola.errors import MolaError
from mola.files.atomic import WRITE_TEST
from mola.training.callbacks import MetricsFile, ResumedRun
from mola.training.checkpoints import check_best_checkpoint, check_same_run
from mola.training.trainer import SeededGroups
from tests.damage import change_tensors
from tests.grids import slow
from tests.training.runs import NO_EVALUATION, WEIGHTS, assert_same_weights, losses, read_metrics, read_record
from tests.waiting import PATIENCE, wait_until

INTERRUPTIBLE = {
    "lora_dropout": 0.1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "validation_size": 1,
    "learning_rate": 1e-3,
}
UNSAVED = {"save_strategy": "no", "load_best_model_at_end": "false"}


@pytest.fixture
def run_and_signal(monkeypatch, capsys):
    """Run the command here and send a signal after the fifth step: exit code and what it said."""

    def run(arguments: list[str], folder: Path, number: int) -> tuple[int, str]:
        original = MetricsFile.on_log

        def on_log(self, args, state, control, **options):
            original(self, args, state, control, **options)
            if state.global_step == 5:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(MetricsFile, "on_log", on_log)
            return main(arguments), capsys.readouterr().err

    return run


def start_and_signal(arguments: list[str], folder: Path, number: int) -> tuple[int, str]:
    """The same with a process of its own, after a few steps."""
    command = [sys.executable, "-m", "mola.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: with more threads sums are rounded otherwise
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: num_lines(folder / "metrics.jsonl") >= 8, process)
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode, errors


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def add_an_hour(checkpoint: Path) -> None:
    """As if the training until this checkpoint had taken an hour longer."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["stateful_callbacks"]["TrainingClock"]["args"]["seconds"] += 3600
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.fixture(scope="module")
def uninterrupted():
    """Folders of the runs that nobody stopped, each made once, by epochs."""
    return {}


@pytest.mark.parametrize("name", ["SIGINT", *slow("SIGTERM")])
@pytest.mark.parametrize(
    ("in_own_process", "epochs"), [(False, 3), pytest.param(True, 20, marks=pytest.mark.slow)], ids=["", "process"]
)
def test_interrupted_run_resumes_to_the_very_same_weights(
    flags, tmp_path, tmp_path_factory, uninterrupted, run_and_signal, in_own_process, epochs, name
):
    options = {**INTERRUPTIBLE, "num_train_epochs": epochs}  # of three steps
    if epochs not in uninterrupted:
        uninterrupted[epochs] = tmp_path_factory.mktemp("whole") / "run"
        assert main(flags(uninterrupted[epochs], **options)) == 0
    whole, folder = uninterrupted[epochs], tmp_path / "run"
    run = start_and_signal if in_own_process else run_and_signal
    code, errors = run(flags(**options), folder, getattr(signal, name))
    assert code == 130, errors
    assert "--resume_from_checkpoint last" in errors
    assert "Traceback" not in errors
    record = read_record(folder)
    assert record["status"] == "interrupted"
    assert 0 < record["steps"] < 3 * epochs
    assert (folder / f"checkpoint-{record['steps']}" / "trainer_state.json").is_file()
    assert (folder / WEIGHTS).is_file()
    assert max(losses(folder)) == record["steps"]
    add_an_hour(folder / f"checkpoint-{record['steps']}")

    assert main([*flags(**options), "--resume_from_checkpoint", "last"]) == 0
    assert read_record(folder)["status"] == "finished"
    assert 3600 < read_record(folder)["seconds"] < 4000
    assert_same_weights(folder, whole)
    assert losses(folder) == losses(whole)
    evaluations = [
        [(entry["step"], entry["eval_loss"]) for entry in read_metrics(run) if "eval_loss" in entry]
        for run in (folder, whole)
    ]
    assert evaluations[0] == evaluations[1]
    assert [entry["step"] for entry in read_metrics(folder) if "train_runtime" in entry] == [3 * epochs]


@pytest.mark.slow
def test_resumed_run_keeps_the_groups_of_similar_length(flags, tmp_path, run_and_signal):
    """Stopped within the second epoch: no sample comes twice, or not at all."""
    options = {**INTERRUPTIBLE, "num_train_epochs": 3, "train_sampling_strategy": "group_by_length"}
    assert main(flags(tmp_path / "whole", **options)) == 0
    code, errors = run_and_signal(flags(**options), tmp_path / "run", signal.SIGTERM)
    assert code == 130, errors
    assert main([*flags(**options), "--resume_from_checkpoint", "last"]) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_groups_of_similar_length_depend_on_seed_and_epoch_only():
    lengths, epochs = [1 + i % 7 for i in range(200)], [0]
    original = LengthGroupedSampler(4, lengths=lengths)
    first, second = (SeededGroups(original, seed, lambda: epochs[0]) for seed in (0, 1))
    orders = []
    for number in (0, 1):
        epochs[0] = number
        torch.manual_seed(number + 5)  # of the run, which does not count
        orders += [[*first], [*second]]
        assert [*first] == orders[-2]
    assert all(sorted(order) == [*range(200)] for order in orders)
    assert orders[0] != orders[2]  # another epoch
    assert orders[0] != orders[1]  # another seed
    for order in orders:
        batches = [[lengths[i] for i in order[k : k + 4]] for k in range(0, 200, 4)]
        assert sum(max(batch) - min(batch) for batch in batches) < 0.1 * 6 * len(batches)


@pytest.mark.parametrize(
    ("number", "saves"), [(signal.SIGTERM, {}), *slow((signal.SIGTERM, UNSAVED), (signal.SIGINT, {}))]
)
def test_a_signal_in_the_last_evaluation_ends_the_run_in_order(
    number, saves, flags, tmp_path, monkeypatch, capsys, caplog
):
    """And the same command with `last` makes up for the evaluation, also where nothing is saved on the way."""
    options = {**INTERRUPTIBLE, "num_train_epochs": 1, "validation_size": 5, "per_device_eval_batch_size": 1, **saves}
    options["eval_delay"] = 100  # no evaluation during training
    assert main(flags(tmp_path / "whole", **options)) == 0
    seen = []

    class Signalling(MetricsFile):
        def on_prediction_step(self, args, state, control, **kwargs):
            if any("train_loss" in entry for entry in state.log_history):
                seen.append(state.global_step)
                if len(seen) == 2:
                    os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr("mola.training.trainer.MetricsFile", Signalling)
        assert main(flags(**options)) == 130
    assert len(seen) < 5
    assert "leaving the evaluation" in caplog.text
    assert "Traceback" not in capsys.readouterr().err
    folder = tmp_path / "run"
    assert read_record(folder)["status"] == "interrupted"
    assert_same_weights(folder, tmp_path / "whole")
    assert main([*flags(**options), "--resume_from_checkpoint", "last"]) == 0
    assert read_record(folder)["status"] == "finished"
    records = [read_record(each)["metrics"]["eval_loss"] for each in (folder, tmp_path / "whole")]
    assert records[0] == records[1]


def test_a_finished_run_is_evaluated_again_only_in_other_batches(flags, tmp_path):
    options = {"num_train_epochs": 1, "validation_size": 5, "per_device_eval_batch_size": 4, "num_experts": "2-4"}
    assert main(flags(**options)) == 0
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text("utf-8").replace('"2-4"', '"24"'), "utf-8")  # what earlier versions wrote
    first = read_record(tmp_path / "run")["metrics"]["eval_loss"]
    for size, evaluated in ((4, [2]), (1, [2, 2])):
        again = {**options, "per_device_eval_batch_size": size, "resume_from_checkpoint": "last"}
        assert main(flags(**again)) == 0
        assert [entry["step"] for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry] == evaluated
        tolerance = 0 if size == 4 else 1e-4
        assert read_record(tmp_path / "run")["metrics"]["eval_loss"] == pytest.approx(first, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("is_gone", [True, False])
def test_resumed_run_takes_the_adapter_of_its_checkpoint(flags, tmp_path, run_and_signal, is_gone):
    """Whatever is in the folder of that adapter by then."""
    plain = {**NO_EVALUATION, "max_steps": 8, "num_train_epochs": None, "warmup_steps": 0}
    for name, alpha in (("start", 4), ("other", 64)):
        assert main(flags(tmp_path / name, **{**plain, "max_steps": 1}, lora_alpha=alpha)) == 0
    onward = {**plain, "adapter": tmp_path / "start"}
    assert main(flags(tmp_path / "whole", **onward)) == 0
    code, errors = run_and_signal(flags(**onward), tmp_path / "run", signal.SIGINT)
    assert code == 130, errors
    shutil.rmtree(tmp_path / "start")
    if not is_gone:
        shutil.copytree(tmp_path / "other", tmp_path / "start")
    assert main([*flags(**onward), "--resume_from_checkpoint", "last"]) == 0
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("schedule", ["linear", *slow("cosine")])
def test_run_resumed_with_more_epochs_has_the_rates_of_the_longer_schedule(schedule, flags, tmp_path):
    """Not with the 0 at which the shorter one ended."""
    options = {**NO_EVALUATION, "lr_scheduler_type": schedule, "save_strategy": "epoch", "warmup_steps": 0}
    assert main(flags(tmp_path / "whole", **{**options, "num_train_epochs": 2})) == 0
    assert main(flags(**{**options, "num_train_epochs": 1})) == 0
    assert main([*flags(**{**options, "num_train_epochs": 2}), "--resume_from_checkpoint", "last"]) == 0
    rates = [
        {entry["step"]: entry["learning_rate"] for entry in read_metrics(each) if "learning_rate" in entry}
        for each in (tmp_path / "run", tmp_path / "whole")
    ]
    assert rates[1][4] > 0
    assert rates[0][4] == pytest.approx(rates[1][4], rel=1e-12)
    assert rates[0][6] == pytest.approx(rates[1][6], rel=1e-12)


@pytest.mark.parametrize("restores", [*slow("true"), "false"])
def test_training_time_includes_the_time_before_a_resume(restores, finished_run):
    folder, arguments = finished_run
    add_an_hour(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-6")
    again = [*arguments, "--resume_from_checkpoint=last", f"--restore_callback_states_from_checkpoint={restores}"]
    assert main(again) == 0
    assert 3600 < read_record(folder)["seconds"] < 4000


@pytest.fixture(scope="module")
def made():
    """Where `finished_run` is kept, once it is made."""
    return []


@pytest.fixture
def finished_run(flags, tmp_path, made, tmp_path_factory):
    """A run of 6 steps with a checkpoint after every second one, copied for every test; returns (folder, flags)."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "max_steps": 6,
        "lora_dropout": 0.1,
        "num_train_epochs": None,
    }
    folder, arguments = tmp_path / "run", flags(**options)
    if made:
        shutil.copytree(made[0], folder)
    else:
        assert main(arguments) == 0
        made.append(shutil.copytree(folder, tmp_path_factory.mktemp("finished") / "run"))
    return folder, arguments


def test_resume_from_a_named_checkpoint_in_another_folder(finished_run, tmp_path, flags):
    folder, arguments = finished_run
    other = [f"--output={tmp_path / 'other'}", f"--resume_from_checkpoint={folder / 'checkpoint-4'}"]
    assert main([*arguments, *other]) == 0
    assert_same_weights(tmp_path / "other", folder)
    curve = losses(tmp_path / "other")
    assert curve == losses(folder), "with what came before the checkpoint"
    trained = [entry["train_loss"] for entry in read_metrics(tmp_path / "other") if "train_loss" in entry]
    assert trained == [pytest.approx((curve[5] + curve[6]) / 2, abs=1e-3)], "the mean of its own steps"


def test_incomplete_checkpoint_is_skipped_with_a_warning(finished_run, caplog):
    folder, arguments = finished_run
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    (folder / "checkpoint-notes").mkdir()
    (folder / "checkpoint-4" / "sha256.json").write_text('{"optimizer.pt": "0"}')  # earlier versions wrote such a file
    earlier = (folder / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 0
    assert (folder / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns == earlier, "it did not begin anew"
    assert "checkpoint-6, which has no trainer_state.json" in caplog.text
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert (folder / WEIGHTS).read_bytes() == whole


def test_checkpoint_of_an_earlier_version_is_resumed(finished_run):
    """Earlier versions wrote the sha256 of every file into the checkpoint."""
    folder, arguments = finished_run
    whole = (folder / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "checkpoint-6")
    digests = {"optimizer.pt": "0" * 64, "sha256.json": "0" * 64}
    (folder / "checkpoint-4" / "sha256.json").write_text(json.dumps(digests), encoding="utf-8")
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 0
    assert (folder / WEIGHTS).read_bytes() == whole


def test_checkpoint_with_weights_that_are_not_finite_is_refused(finished_run, error_line):
    folder, arguments = finished_run
    change_tensors(folder / "checkpoint-6", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    assert "are not finite" in error_line([*arguments, "--resume_from_checkpoint=last", "--max_steps=7"])


def test_checkpoint_without_optimizer_is_not_resumed(flags, tmp_path, error_line):
    options = {"save_only_model": "true", "eval_strategy": "no", "num_train_epochs": 1}
    assert main(flags(**options)) == 0
    line = error_line([*flags(**options), f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-3'}"])
    assert "`save_only_model`" in line


@pytest.mark.parametrize("schedule", [*slow("linear"), "polynomial"])
def test_resuming_a_finished_run_changes_nothing(finished_run, schedule):
    folder, arguments = finished_run
    whole = (folder / WEIGHTS).read_bytes()
    assert main([*arguments, "--resume_from_checkpoint=last", f"--lr_scheduler_type={schedule}"]) == 0
    assert (folder / WEIGHTS).read_bytes() == whole
    record = read_record(folder)
    assert (record["status"], record["steps"]) == ("finished", 6)
    assert "train_loss" not in record["metrics"], "no step was trained, so there is no loss"


def test_resume_refuses_another_allocation_or_other_data(finished_run, error_line, tmp_path):
    _, arguments = finished_run
    assert "`num_experts`" in error_line([*arguments, "--resume_from_checkpoint=last", "--num_experts=2222"])
    rows = [{"id": "1", "instruction": "other", "input": "", "output": "data"}] * 1
    (tmp_path / "other.json").write_text(json.dumps(rows), encoding="utf-8")
    assert "`train`" in error_line([*arguments, "--resume_from_checkpoint=last", f"--data={tmp_path / 'other.json'}"])


def test_resume_refuses_other_settings(finished_run, error_line):
    folder, arguments = finished_run
    said = error_line([*arguments, "--resume_from_checkpoint=last", "--learning_rate=5e-2"])
    assert "`learning_rate` (settings) differs" in said
    assert str(folder) in said
    record = read_record(folder)
    names = ["cutoff_len", "truncation", "train_on_inputs", "add_eos_token", "seed", "data_seed", "optim", "optim_args"]
    names += ["learning_rate", "loraplus_lr_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"]
    for name in names:
        changed = {**record, "settings": {**record["settings"], name: "other"}}
        with pytest.raises(MolaError, match=rf"`{name}` \(settings\) differs: .*, now 'other'"):
            check_same_run(folder / "checkpoint-6", changed)


def test_resume_refuses_another_template(finished_run, error_line, capsys):
    """The template may be that of the task, which no option shows."""
    folder, arguments = finished_run
    said = error_line([*arguments, "--resume_from_checkpoint=last", "--template=vigogne"])
    assert "`template` (prompts) differs: 'meta'" in said
    record = read_record(folder)
    record["template"] = "alpaca_short"
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "`template` (prompts) differs: 'alpaca_short'" in error_line([*arguments, "--resume_from_checkpoint=last"])


def test_best_checkpoint_is_looked_for_in_the_copied_folder_first(tmp_path):
    """The folder that the state names may hold another run by now."""
    state = {"best_model_checkpoint": str(tmp_path / "first" / "checkpoint-4"), "best_global_step": 4}
    arguments = TrainingArguments(output_dir=str(tmp_path / "copy"), use_cpu=True)
    for expected in ("first", "copy"):
        (tmp_path / expected / "checkpoint-4").mkdir(parents=True)
        trainer_state = TrainerState(**state)
        ResumedRun(tmp_path / "copy").on_train_begin(arguments, trainer_state, TrainerControl())
        assert trainer_state.best_model_checkpoint == str(tmp_path / expected / "checkpoint-4")


def test_a_best_checkpoint_without_an_adapter_is_refused(finished_run):
    folder, _ = finished_run
    path = folder / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    earlier = folder.parent / "before" / "checkpoint-4"  # the run folder was moved since
    for place in (folder / "checkpoint-4", earlier):
        path.write_text(json.dumps({**state, "best_model_checkpoint": str(place)}), encoding="utf-8")
        check_best_checkpoint(folder / "checkpoint-6")
    (folder / "checkpoint-4" / WEIGHTS).unlink()
    with pytest.raises(MolaError, match=f"`load_best_model_at_end` needs the best checkpoint.*{earlier}"):
        check_best_checkpoint(folder / "checkpoint-6")


def test_a_schedule_that_follows_evaluations_must_stay_the_same(finished_run, error_line):
    folder, arguments = finished_run
    record = read_record(folder)
    record["settings"] |= {"lr_scheduler_type": "greedy"}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    said = error_line([*arguments, "--resume_from_checkpoint=last"])
    assert "`lr_scheduler_type` (settings) differs" in said


def test_resume_warns_of_other_batches_and_another_precision(finished_run, caplog, error_line):
    folder, arguments = finished_run
    on = [*arguments, "--resume_from_checkpoint=last", "--max_steps=7"]
    assert main([*on, "--batch_size=2", "--dtype=bfloat16"]) == 0
    assert "continues with 2 samples per step, it began with 4" in caplog.text
    assert "continues with `bf16` True, it began with False" in caplog.text
    record = read_record(folder)
    record["settings"] |= {"fp16": True, "bf16": False}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "`fp16` (settings) differs" in error_line(on)


def test_write_test_of_another_process_is_no_earlier_run(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{WRITE_TEST}abc").touch()
    assert main(flags(**{**NO_EVALUATION, "max_steps": 2})) == 0


@pytest.mark.slow
def test_a_resumed_run_without_telemetry_drops_what_came_after_its_checkpoint(flags, tmp_path, caplog):
    options = NO_EVALUATION | {"num_experts": "1224", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    assert main(flags(**options)) == 0
    on = [
        *flags(**options),
        f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}",
        "--expert_telemetry=false",
    ]
    assert main(on) == 0
    assert "checkpoint-4: the run resumes from checkpoint-2" in caplog.text
    lines = (tmp_path / "run" / "routing.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_chat_templates_with_names_are_replaced(flags, tiny_model_dir, tmp_path):
    """They are saved into a folder, which was there already when a run went on."""
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(base)
    options = {"base_model": base, "save_strategy": "epoch", "num_train_epochs": 1}
    assert main(flags(**NO_EVALUATION | options)) == 0
    (named,) = (tmp_path / "run").glob("*/rag.jinja")
    named.write_text("another one")
    on = [*flags(**NO_EVALUATION | options | {"num_train_epochs": 2}), "--resume_from_checkpoint=last"]
    assert main(on) == 0
    assert named.read_text() == "{{ documents }}"


def test_resume_warns_of_another_base_model(finished_run, tmp_path, caplog):
    _, arguments = finished_run
    base = next(word for word in arguments if word.startswith("--base_model=")).partition("=")[2]
    other = shutil.copytree(base, tmp_path / "other")
    assert main([*arguments, f"--base_model={other}", "--resume_from_checkpoint=last"]) == 0
    assert "was trained on" in caplog.text
    assert str(other) in caplog.text


def test_overwrite_removes_the_earlier_run_and_nothing_else(finished_run, error_line):
    folder, arguments = finished_run
    assert "--overwrite" in error_line(arguments)
    foreign = {"notes.txt": "mine", "checkpoint-list.txt": "mine", "checkpoint-old/keep.txt": "mine"}
    for name, text in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / ".saving-left").mkdir()
    short = ["--overwrite=true", "--max_steps=2"]
    assert main([*arguments, *short]) == 0
    assert {path.name for path in folder.glob("checkpoint-[0-9]*")} == {"checkpoint-2"}
    assert sorted(losses(folder)) == [1, 2]
    assert not (folder / ".saving-left").exists()
    assert {name: (folder / name).read_text(encoding="utf-8") for name in foreign} == foreign


@pytest.mark.parametrize("name", ["checkpoint-2", "adapter_config.json", "tokenizer.json"])
def test_files_of_another_program_are_not_overwritten(flags, tmp_path, error_line, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    line = error_line([*flags(), "--overwrite"])
    assert f"holds {name!r} but no run.json" in line
    assert (tmp_path / "run" / name).is_dir()


@pytest.mark.slow
def test_the_curve_survives_a_resume_with_counted_tokens(flags, tmp_path):
    options = {**NO_EVALUATION, "include_num_input_tokens_seen": "true", "save_strategy": "steps", "save_steps": 2}
    arguments = flags(**{**options, "max_steps": 4})
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_adapter_in_the_run_folder_is_not_overwritten(finished_run, error_line, flags):
    folder, _ = finished_run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for start in (folder, folder / "checkpoint-2"):
        arguments = flags(output_dir=folder, adapter=start, num_experts=None, **NO_EVALUATION)
        line = error_line([*arguments, "--overwrite"])
        assert f"`adapter` must be outside `output`: got {str(start)!r} and {str(folder)!r}" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_readme_of_the_user_survives(flags, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("my notes", encoding="utf-8")
    assert main([*flags(max_steps=1, warmup_steps=0), "--overwrite"]) == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == "my notes"
