"""`mola train`: what a run leaves behind, repeats, resumes and refuses to go on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerState, set_seed

from mola import MolaLinear, TrainOptions, train
from mola.cli import main
from mola.data.encode import encode_examples
from mola.data.prepare import PrepareOptions, load_examples, prepare
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.evaluate import EvaluateOptions
from mola.loading import load_tokenizer, resolve_device, resolve_dtype
from mola.training.callbacks import FiniteLoss
from mola.training.setup import build_model

WEIGHTS = "adapter_model.safetensors"
NO_EVALUATION = {"eval_strategy": "no", "save_strategy": "no"}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """Ten short prepared rows."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [
        {
            "id": f"row-{i}",
            "instruction": "Count " * (1 + i % 3) + str(i),
            "input": "",
            "output": f"Answer: The answer is {'ABC'[i % 3]}.",
            "answer": "ABC"[i % 3],
        }
        for i in range(10)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def flags(tiny_model_dir, rows_file, tmp_path):
    """Command line of a short run in `tmp_path/run`; options given replace or extend it."""

    def build(output_dir: Path | str = tmp_path / "run", **options) -> list[str]:
        settings = {
            "base_model": tiny_model_dir,
            "data": rows_file,
            "output_dir": output_dir,
            "dtype": "float32",
            "template": "meta",
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "disable_tqdm": "true",
            **options,
        }
        return ["train", *(f"--{name}={value}" for name, value in settings.items() if value is not None)]

    return build


@pytest.fixture
def error_line(capsys):
    """Runs the command, expects wrong input, returns the error line."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mola train: error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


def read_record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> list[dict]:
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; a step that occurs twice fails."""
    entries = [(entry["step"], entry["loss"]) for entry in read_metrics(folder) if "loss" in entry]
    assert len(entries) == len(dict(entries))
    return dict(entries)


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def evaluation_loss(folder: Path, base: Path, data: Path, rows: slice, **encoding) -> float:
    """Mean loss per trained token, one sample at a time and without the trainer."""
    tokenizer = load_tokenizer(base, "right")
    examples = load_examples(data, None, None)[rows]
    encoded, _ = encode_examples(examples, tokenizer, get_template("meta"), cutoff_len=512, **encoding)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    total, count = 0.0, 0
    for sample in encoded:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


# ---------------------------------------------------------------------- the run folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_folder_is_complete_and_loads_everywhere(flags, tmp_path, tiny_model_dir, dtype):
    assert main(flags(dtype=dtype, num_experts="1224", r="2", top_k="2")) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", WEIGHTS, "run.json", "metrics.jsonl"} <= names
    assert not [name for name in names if name.startswith(".")]
    record = read_record(folder)
    assert record["status"] == "finished"
    assert record["settings"]["learning_rate"] == 1e-2
    assert record["adapter_settings"]["num_experts"] == "1224"
    assert {"mola", "torch", "transformers", "peft", "python"} <= record["versions"].keys()
    assert len(record["data_fingerprints"]["train"]) == 64
    assert record["metrics"]["train_loss"] > 0
    assert sorted(losses(folder)) == list(range(1, record["steps"] + 1))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["num_experts"] == [1, 2, 2, 4]
    weights = load_file(folder / WEIGHTS)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "mola_B" in name)

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.arange(20).reshape(1, -1)
    with torch.no_grad():
        before = base(ids).logits
        one = PeftModel.from_pretrained(base, folder).eval()(ids).logits
        two = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert torch.equal(one, two)
    assert (one - before).abs().max() > 1e-2


def test_use_of_experts_is_recorded_unless_it_is_switched_off(flags, tmp_path, tiny_model_dir):
    assert main(flags(tmp_path / "on", num_experts="1224", logging_steps=2)) == 0
    lines = [json.loads(line) for line in (tmp_path / "on" / "routing.jsonl").read_text("utf-8").splitlines()]
    entries = [entry for entry in read_metrics(tmp_path / "on") if "loss" in entry]
    assert [line["step"] for line in lines] == [entry["step"] for entry in entries] == [2, 4, 6]
    assert [len(line["modules"]) for line in lines] == [3 * 7] * 3
    assert all(0 < entry["experts/balance"] <= 1 for entry in entries)
    assert main(flags(tmp_path / "off", num_experts="1224", logging_steps=2, expert_telemetry="false")) == 0
    assert main(flags(tmp_path / "lora", num_experts="1", logging_steps=2)) == 0
    for name in ("off", "lora"):
        assert not (tmp_path / name / "routing.jsonl").exists()
        assert not [key for entry in read_metrics(tmp_path / name) for key in entry if key.startswith("experts/")]
    assert_same_weights(tmp_path / "on", tmp_path / "off")


def test_base_keeps_its_number_format_and_its_values(flags, tiny_model_dir, monkeypatch):
    """The very model that was trained, looked at after training."""
    built = []
    module = sys.modules["mola.train"]  # `mola.train` is the function
    monkeypatch.setattr(module, "build_model", lambda options: built.append(build_model(options)) or built[0])
    assert main(flags(dtype="bfloat16", max_steps=2, num_experts=2, **NO_EVALUATION)) == 0
    trained = dict(built[0].named_parameters())
    experts = {name for name in trained if ".mola_" in name}
    assert {trained[name].dtype for name in experts} == {torch.float32}
    assert {name for name in trained if trained[name].requires_grad} == experts
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    before = dict(base.named_parameters())
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): trained[name] for name in trained}
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name].cpu(), tensor), name


def test_building_draws_the_experts_and_routers_alone(tiny_model_dir, tmp_path):
    """No random number is spent on weights that are then replaced: drawing the same by hand ends in the same state."""
    options = TrainOptions(
        base_model=str(tiny_model_dir), output_dir=str(tmp_path), dtype="float32", num_experts="2468", use_cpu=True
    )
    model = build_model(options)
    state = torch.get_rng_state()
    set_seed(options.seed)
    layers = [module for module in model.modules() if isinstance(module, MolaLinear)]
    assert len(layers) == 28
    for layer in layers:
        bound = layer.in_features**-0.5
        for drawn in (layer.mola_A["default"], layer.mola_router["default"]):
            assert torch.equal(drawn, torch.empty_like(drawn).uniform_(-bound, bound))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_and_evaluation_choose_the_same_number_format(tmp_path):
    assert TrainOptions.dtype == EvaluateOptions.dtype == "auto"
    options = TrainOptions(base_model="x", output_dir=str(tmp_path))
    chosen, _ = resolve_dtype("auto", resolve_device(None))
    assert options.base_dtype == str(chosen).removeprefix("torch.")


def test_saved_weights_are_those_of_the_lowest_evaluation_loss(flags, tmp_path, tiny_model_dir, rows_file):
    data = tmp_path / "validation.json"
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    data.write_text(json.dumps(rows[:3]), encoding="utf-8")
    # The rate rises to a hundred times its start: the loss gets better first and much worse afterwards.
    options = {"num_train_epochs": 6, "warmup_steps": 0, "lr_scheduler_type": "cosine_with_min_lr"}
    options["lr_scheduler_kwargs"] = '{"min_lr_rate": 100}'
    assert main(flags(eval_data=data, lora_dropout=0, save_total_limit=1, **options)) == 0
    folder = tmp_path / "run"
    # The last entry is the evaluation of the weights that were kept.
    *curve, final = [entry["eval_loss"] for entry in read_metrics(folder) if "eval_loss" in entry]
    assert len(curve) == 6
    assert curve[-1] > min(curve), "the last epoch has to be a worse one for this test"
    record = read_record(folder)
    assert record["metrics"]["eval_loss"] == final == min(curve)
    assert Path(record["best_checkpoint"]).name == f"checkpoint-{3 * (1 + curve.index(min(curve)))}"
    assert_same_weights(folder, Path(record["best_checkpoint"]))
    assert evaluation_loss(folder, tiny_model_dir, data, slice(None)) == pytest.approx(final, rel=1e-5)


def test_evaluation_can_be_switched_off_although_there_is_a_validation_split(flags, tmp_path):
    options = {"train_size": 8, "validation_size": 4, "test_size": 4}
    prepare(PrepareOptions("sample", str(tmp_path / "data"), **options))
    assert main(flags(data=tmp_path / "data" / "dataset.hf", num_train_epochs=1, **NO_EVALUATION)) == 0
    record = read_record(tmp_path / "run")
    assert record["data"].keys() == {"train"}
    assert "eval_loss" not in record["metrics"]


def test_validation_split_is_evaluated_at_the_interval_asked_for(flags, tmp_path):
    options = {"train_size": 8, "validation_size": 4, "test_size": 4}
    prepare(PrepareOptions("sample", str(tmp_path / "data"), **options))
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    assert main(flags(data=tmp_path / "data" / "dataset.hf", **steps)) == 0
    record = read_record(tmp_path / "run")
    assert [record["data"][name]["kept"] for name in ("train", "evaluation")] == [8, 4]
    evaluated = [entry["step"] for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry]
    assert evaluated == [2, 4, 4]  # the last one is that of the weights that were kept


def test_validation_size_takes_rows_away_from_training(flags, tmp_path):
    assert main(flags(validation_size=0.25, num_train_epochs=1)) == 0
    record = read_record(tmp_path / "run")
    assert [record["data"][name]["total"] for name in ("train", "evaluation")] == [7, 3]
    assert record["data_fingerprints"]["train"] != record["data_fingerprints"]["evaluation"]


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(flags, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert main(flags(tmp_path / name, seed=seed, lora_dropout=0.1, num_train_epochs=1, **NO_EVALUATION)) == 0
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    first, other = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "c" / WEIGHTS)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_options_of_the_caller_stay_as_they_are(tiny_model_dir, rows_file, tmp_path):
    options = TrainOptions(
        base_model=str(tiny_model_dir),
        data=str(rows_file),
        output_dir=str(tmp_path / "run"),
        template="meta",
        dtype="float32",
        max_steps=2,
        disable_tqdm=True,
    )
    before = options.to_dict()
    result = train(options)
    assert options.to_dict() == before
    assert (result.status, result.steps, result.best_checkpoint) == ("finished", 2, None)
    assert result.trainable_parameters == sum(w.numel() for w in load_file(tmp_path / "run" / WEIGHTS).values())


# ---------------------------------------------------------------------- interruption and resuming

INTERRUPTIBLE = {
    "lora_dropout": 0.1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 20,
    "validation_size": 1,
    "learning_rate": 1e-3,
}


def start_and_signal(arguments: list[str], folder: Path, number: int) -> subprocess.CompletedProcess:
    """Run the command and send a signal after a few steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "mola.cli", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 60
        curve = folder / "metrics.jsonl"
        while not curve.exists() or len(curve.read_text(encoding="utf-8").splitlines()) < 8:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, "", errors)


@pytest.fixture(scope="module")
def uninterrupted():
    """Folder of the run that nobody stopped, made once."""
    return {}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_run_resumes_to_the_very_same_weights(
    flags, tmp_path, tmp_path_factory, uninterrupted, name, capfd
):
    if not uninterrupted:
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert main(flags(folder, **INTERRUPTIBLE)) == 0
        uninterrupted["folder"] = folder
    folder = tmp_path / "run"
    process = start_and_signal(flags(**INTERRUPTIBLE), folder, getattr(signal, name))
    assert process.returncode == 130, process.stderr
    assert "--resume_from_checkpoint last" in process.stderr
    assert "Traceback" not in process.stderr
    record = read_record(folder)
    assert record["status"] == "interrupted"
    assert 0 < record["steps"] < 60
    assert (folder / f"checkpoint-{record['steps']}" / "trainer_state.json").is_file()
    assert (folder / WEIGHTS).is_file()
    assert max(losses(folder)) == record["steps"]

    assert main([*flags(**INTERRUPTIBLE), "--resume_from_checkpoint", "last"]) == 0
    whole = uninterrupted["folder"]
    assert read_record(folder)["status"] == "finished"
    assert_same_weights(folder, whole)
    assert losses(folder) == losses(whole)
    evaluations = [
        [(entry["step"], entry["eval_loss"]) for entry in read_metrics(run) if "eval_loss" in entry]
        for run in (folder, whole)
    ]
    assert evaluations[0] == evaluations[1]
    assert [entry["step"] for entry in read_metrics(folder) if "train_runtime" in entry] == [60]


@pytest.fixture
def finished_run(flags, tmp_path):
    """A run of 6 steps with a checkpoint after every second one; returns (folder, flags)."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "max_steps": 6,
        "lora_dropout": 0.1,
        "num_train_epochs": None,
    }
    arguments = flags(**options)
    assert main(arguments) == 0
    return tmp_path / "run", arguments


def test_resume_from_a_named_checkpoint_in_another_folder(finished_run, tmp_path, flags):
    folder, arguments = finished_run
    other = [f"--output_dir={tmp_path / 'other'}", f"--resume_from_checkpoint={folder / 'checkpoint-4'}"]
    assert main([*arguments, *other]) == 0
    assert_same_weights(tmp_path / "other", folder)
    assert sorted(losses(tmp_path / "other")) == [5, 6]


def test_incomplete_checkpoint_is_skipped_with_a_warning(finished_run, caplog):
    folder, arguments = finished_run
    whole = (folder / WEIGHTS).read_bytes()
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    (folder / "checkpoint-notes").mkdir()
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 0
    assert "checkpoint-6, which has no trainer_state.json" in caplog.text
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert (folder / WEIGHTS).read_bytes() == whole


def test_checkpoint_without_optimizer_is_not_resumed(flags, tmp_path, error_line):
    options = {"save_only_model": "true", "eval_strategy": "no", "num_train_epochs": 1}
    assert main(flags(**options)) == 0
    line = error_line([*flags(**options), f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-3'}"])
    assert "`save_only_model`" in line


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both(flags, tmp_path):
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    arguments = [sys.executable, "-m", "mola.cli", *flags(num_train_epochs=100, use_cpu="true", **NO_EVALUATION)]
    processes = [
        subprocess.Popen(
            arguments,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 90
        curve = folder / "metrics.jsonl"
        while not curve.exists() or len(curve.read_text(encoding="utf-8").splitlines()) < 5:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.005)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [130, 130], errors
    record = read_record(folder)
    assert record["status"] == "interrupted"
    assert (folder / f"checkpoint-{record['steps']}" / "trainer_state.json").is_file()


def test_resuming_a_finished_run_changes_nothing(finished_run):
    folder, arguments = finished_run
    whole = (folder / WEIGHTS).read_bytes()
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 0
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


# ---------------------------------------------------------------------- overwriting


def test_overwrite_removes_the_earlier_run_and_nothing_else(finished_run, error_line):
    folder, arguments = finished_run
    assert "--overwrite_output_dir" in error_line(arguments)
    foreign = {"notes.txt": "mine", "checkpoint-list.txt": "mine", "checkpoint-old/keep.txt": "mine"}
    for name, text in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / ".saving-left").mkdir()
    short = ["--overwrite_output_dir=true", "--max_steps=2"]
    assert main([*arguments, *short]) == 0
    assert {path.name for path in folder.glob("checkpoint-[0-9]*")} == {"checkpoint-2"}
    assert sorted(losses(folder)) == [1, 2]
    assert not (folder / ".saving-left").exists()
    assert {name: (folder / name).read_text(encoding="utf-8") for name in foreign} == foreign


@pytest.mark.parametrize("place", [".", "checkpoint-2"])
def test_adapter_in_the_run_folder_is_not_overwritten(finished_run, error_line, flags, place):
    folder, _ = finished_run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    start = folder / place
    arguments = flags(output_dir=folder, adapter=start, num_experts=None, **NO_EVALUATION)
    for more in ([], ["--overwrite_output_dir"]):
        line = error_line([*arguments, *more])
        assert f"`adapter` must lie outside of `output_dir`: got {str(start)!r} and {str(folder)!r}" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_readme_of_the_user_survives(flags, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("my notes", encoding="utf-8")
    assert main([*flags(max_steps=1, warmup_steps=0), "--overwrite_output_dir"]) == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == "my notes"


def test_earlier_run_survives_options_that_are_wrong(finished_run, error_line):
    folder, arguments = finished_run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error_line([*arguments, "--overwrite_output_dir", "--num_experts=2,4,6"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------- what a run can be


def test_adapter_is_trained_on_with_its_own_configuration(flags, tmp_path, tiny_model_dir, rows_file):
    first = {"num_experts": "1224", "r": 3, "lora_dropout": 0, "router_aux_loss_coef": 0}
    assert main(flags(tmp_path / "first", **first, **NO_EVALUATION)) == 0
    whole_batch = {"per_device_train_batch_size": 10, "num_train_epochs": 3, "warmup_steps": 0, **NO_EVALUATION}
    assert main(flags(tmp_path / "second", adapter=tmp_path / "first", **whole_batch)) == 0
    expected = evaluation_loss(tmp_path / "first", tiny_model_dir, rows_file, slice(None))
    assert losses(tmp_path / "second")[1] == pytest.approx(expected, rel=1e-4)
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text(encoding="utf-8"))
        for name in ("first", "second")
    ]
    digests = [config.pop("weights_sha256") for config in configs]
    assert configs[0] == configs[1]
    assert digests[0] != digests[1]
    one, two = load_file(tmp_path / "first" / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_no_padding_position_is_trained(flags, tmp_path, tiny_model_dir, rows_file):
    """Padding in front would have to predict the begin token, which counts when prompts are trained."""
    options = {"per_device_train_batch_size": 10, "max_steps": 1, "warmup_steps": 0, "lora_dropout": 0}
    assert main(flags(train_on_inputs="true", learning_rate=1e-30, **options, **NO_EVALUATION)) == 0
    expected = evaluation_loss(tmp_path / "run", tiny_model_dir, rows_file, slice(None), train_on_inputs=True)
    assert losses(tmp_path / "run")[1] == pytest.approx(expected, rel=1e-5)


def test_training_settings_of_a_continued_adapter_may_change(flags, tmp_path, rows_file):
    assert main(flags(num_experts="1224", num_train_epochs=1, **NO_EVALUATION)) == 0
    changes = {"lora_dropout": 0.5, "router_aux_loss_coef": 0.25, "router_aux_loss_reduction": "layer"}
    again = {"adapter": tmp_path / "run", "num_train_epochs": 1, **NO_EVALUATION}
    assert main(flags(tmp_path / "next", **again, **changes)) == 0
    config = json.loads((tmp_path / "next" / "adapter_config.json").read_text(encoding="utf-8"))
    before = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))
    assert {name for name in config if config[name] != before[name]} == {*changes, "weights_sha256"}
    assert {name: config[name] for name in changes} == changes
    assert read_record(tmp_path / "next")["adapter_settings"] == changes


def test_checkpoints_hold_the_adapter_alone_and_load_as_one(flags, tmp_path, tiny_model_dir):
    assert main(flags(num_train_epochs=1)) == 0
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    weights = load_file(checkpoint / WEIGHTS)
    assert [name for name in weights if "mola_" not in name] == []
    assert not (checkpoint / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, checkpoint).named_parameters())
    assert all(torch.equal(loaded[f"{name}.default"], tensor) for name, tensor in weights.items())


def test_adapter_of_another_model_is_refused(flags, tmp_path, error_line):
    assert main(flags(tmp_path / "first", max_steps=1, warmup_steps=0, **NO_EVALUATION)) == 0
    path = tmp_path / "first" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "r": 5}), encoding="utf-8")
    assert "adapter" in error_line(flags(tmp_path / "second", adapter=tmp_path / "first"))


@pytest.mark.parametrize("reduction", ["module", "layer"])
def test_balance_loss_is_the_same_with_gradient_checkpointing_and_accumulation(flags, tmp_path, reduction):
    """10 samples in batches of 2 and 2 batches per step: the fifth batch is a step of its own."""
    settings = {
        "router_aux_loss_coef": 0.5,
        "router_aux_loss_reduction": reduction,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0,
        **NO_EVALUATION,
    }
    assert main(flags(tmp_path / "plain", **settings)) == 0
    assert main(flags(tmp_path / "checkpointed", gradient_checkpointing="true", **settings)) == 0
    assert main(flags(tmp_path / "off", **{**settings, "router_aux_loss_coef": 0})) == 0
    assert read_record(tmp_path / "plain")["steps"] == 6
    first, second, off = (losses(tmp_path / name) for name in ("plain", "checkpointed", "off"))
    assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-4)
    # One router per module is at least 1 when balanced exactly; so is one per layer, summed over four.
    assert first[1] - off[1] > 0.5 * (1 if reduction == "module" else 4) * 0.9
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "checkpointed"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_reentrant_checkpointing_with_a_balance_loss_is_refused(flags, error_line):
    line = error_line(
        flags(
            router_aux_loss_coef=0.1,
            gradient_checkpointing="true",
            gradient_checkpointing_kwargs='{"use_reentrant": true}',
        )
    )
    assert "use_reentrant" in line


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "optim": "adamw_torch"},
        {"train_sampling_strategy": "group_by_length", "report_to": "none", "optim": "sgd"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-5}', "max_grad_norm": 0},
        {"target_modules": r".*self_attn\.(q|v)_proj", "modules_to_save": "lm_head", "max_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "validation_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer_and_of_peft_work(flags, tmp_path, options):
    assert main(flags(**{**NO_EVALUATION, **options})) == 0
    record = read_record(tmp_path / "run")
    assert record["status"] == "finished"
    kept = {name: record["settings"][name] for name in ("weight_decay", "optim", "max_grad_norm") if name in options}
    assert all(str(value).endswith(str(options[name])) or value == options[name] for name, value in kept.items())


def test_modules_to_save_are_saved(flags, tmp_path):
    assert main(flags(modules_to_save="lm_head", max_steps=2, **NO_EVALUATION)) == 0
    assert any("lm_head" in name for name in load_file(tmp_path / "run" / WEIGHTS))


def test_train_on_inputs_given_as_false_is_false(flags, tmp_path):
    for name, value in (("no", "false"), ("yes", "true")):
        assert main(flags(tmp_path / name, train_on_inputs=value, max_steps=2, **NO_EVALUATION)) == 0
    trained = {name: read_record(tmp_path / name)["data"]["train"] for name in ("no", "yes")}
    assert trained["no"]["trained_tokens"] < trained["yes"]["trained_tokens"] == trained["yes"]["tokens"]


# ---------------------------------------------------------------------- divergence


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_divergence_stops_with_one_line_and_leaves_good_checkpoints(flags, tmp_path, error_line, logging_steps):
    """The loss is finite until the second step; without a log entry the weights tell."""
    line = error_line(
        flags(
            learning_rate=1e30,
            warmup_steps=0,
            lr_scheduler_type="constant",
            logging_steps=logging_steps,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="no",
        )
    )
    assert "diverged" in line
    assert " at step " in line
    assert f"--adapter {tmp_path / 'run' / 'checkpoint-1'} in another `output_dir`" in line
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed"
    assert "diverged" in record["error"]
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-1"]
    assert all(torch.isfinite(weight).all() for weight in load_file(checkpoints[0] / WEIGHTS).values())
    read_metrics(tmp_path / "run")
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_divergence_after_the_last_log_entry_is_noticed(flags, error_line):
    line = error_line(flags(learning_rate=1e30, warmup_steps=0, logging_steps=50, num_train_epochs=3, **NO_EVALUATION))
    assert "`train_loss` is nan at step 9" in line


def test_finite_loss_lets_finite_values_pass(tiny_model_dir, tmp_path):
    options = TrainOptions(base_model=str(tiny_model_dir), output_dir=str(tmp_path), dtype="float32")
    FiniteLoss().on_log(options, None, None, logs={"loss": 1.0, "learning_rate": float("nan")})
    with pytest.raises(MolaError, match="`eval_loss` is inf at step 3"):
        FiniteLoss().on_log(options, TrainerState(global_step=3), None, logs={"eval_loss": float("inf")})
