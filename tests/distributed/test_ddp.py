"""`mola train` in several processes with a copy of the model each: the same run as in one process."""

import json
import re
import shutil

import pytest

from .conftest import assert_same_run, goes_on_from, record, weights_of

# Two processes with batches of 2 see what one process sees in two accumulated batches of 2. Gradients are summed in
# another order, and Adam's first steps make much of little.
TOLERANCE = 1e-4
ROUTER_LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}


@pytest.fixture(scope="module")
def whole(processes, flags, tmp_path_factory):
    """A run with router losses, in two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    processes.mola(flags(folder, **ROUTER_LOSSES))
    return folder, list(processes.output)


def test_two_processes_equal_one(processes, flags, whole, tmp_path):
    folder, output = whole
    alone = tmp_path / "alone"
    processes.mola(flags(alone, gradient_accumulation_steps=2, **ROUTER_LOSSES), processes=1)
    assert_same_run(folder, alone, TOLERANCE)
    both = record(folder)
    assert (both["processes"], both["effective_batch_size"], both["status"]) == (2, 4, "finished")
    assert record(alone)["effective_batch_size"] == 4
    # Use of experts: summed over the processes. Weights differ a little, so a near-tie may fall the other way.
    lines, others = routing(folder), routing(alone)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, other in zip(lines, others, strict=True):
        assert line["tokens"] == other["tokens"]
        for ours, theirs in zip(line["modules"], other["modules"], strict=True):
            assert ours["num_tokens"] == theirs["num_tokens"]
            tolerance = 1e-5 if line is lines[0] else 0.02  # before the first update all is the same
            assert ours["shares"] == pytest.approx(theirs["shares"], abs=tolerance)
            assert ours["mean_gates"] == pytest.approx(theirs["mean_gates"], abs=tolerance)
            assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=tolerance)
    # One of them writes and speaks.
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert re.search(r"steps +4\n +effective batch +4 samples", output[0]), output[0]
    assert "The adapter is in" in output[0]
    assert not re.search(r"samples kept|effective batch|finished|'loss'", output[1]), output[1]


def test_losses_are_those_of_all_tokens(processes, flags, tmp_path):
    """Answers of very different length; the last steps are not logged, evaluation batches differ in their tokens."""
    rows = [
        {"id": str(i), "instruction": f"Count {i}", "input": "", "output": "A." if i % 3 else "It is " + "D " * 20}
        for i in range(16)
    ]
    others = [{**row, "output": "A." if i < 8 else "Zq7 " * 30} for i, row in enumerate(rows)]
    for name, content in (("train", rows), ("eval", others)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    options = {"data": tmp_path / "train.json", "eval_data": tmp_path / "eval.json", "validation_size": 0}
    options |= {"logging_steps": 3, "per_device_eval_batch_size": 4}
    processes.mola(flags(tmp_path / "two", **options))
    processes.mola(flags(tmp_path / "one", gradient_accumulation_steps=2, **options), processes=1)
    two, one = (record(tmp_path / name)["metrics"] for name in ("two", "one"))
    for name in ("train_loss", "eval_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)


def routing(folder):
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_resumed_run_is_the_same(processes, flags, whole, tmp_path):
    """Killed after the checkpoint of step 2, with both processes' random numbers in it."""
    options = {**ROUTER_LOSSES, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    processes.mola(flags(tmp_path / "whole", **options))
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    with goes_on_from(folder, "checkpoint-2", removed="checkpoint-4"):
        processes.mola([*flags(folder, **options), "--resume_from_checkpoint=last"])
    for name, tensor in weights_of(folder).items():
        assert (tensor == weights_of(tmp_path / "whole")[name]).all()
    assert routing(folder) == routing(tmp_path / "whole")  # with what both had counted in step 1 and 2
    assert [line["step"] for line in routing(folder)] == [3, 4]
    assert "Skipping" not in processes.output[0]


@pytest.mark.slow
def test_run_goes_on_in_another_number_of_processes(processes, flags, whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    arguments = [*flags(folder, **ROUTER_LOSSES, num_train_epochs=2), "--resume_from_checkpoint=last"]
    processes.mola(arguments, processes=1)
    assert "continues with 2 samples per step, it began with 4" in processes.output[0]
    assert (record(folder)["status"], record(folder)["processes"]) == ("finished", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_experts": 8, "top_k": 1, **ROUTER_LOSSES}, id="idle experts"),
        pytest.param({"router_aux_loss_coef": 0.1, "router_aux_loss_reduction": "layer"}, id="layer"),
        pytest.param({"activation_checkpointing": "true", **ROUTER_LOSSES}, id="checkpointing"),
        pytest.param({"ddp_find_unused_parameters": "false", **ROUTER_LOSSES}, id="no search for unused"),
        pytest.param({"modules_to_save": "lm_head", **ROUTER_LOSSES}, id="modules to save"),
    ],
)
def test_two_processes_equal_one_with(processes, flags, tmp_path, options):
    processes.mola(flags(tmp_path / "two", **options))
    processes.mola(flags(tmp_path / "one", gradient_accumulation_steps=2, **options), processes=1)
    assert_same_run(tmp_path / "two", tmp_path / "one", TOLERANCE)


@pytest.mark.slow
def test_without_router_losses_the_batch_is_all_that_counts(processes, flags, tmp_path):
    """One batch of 4 equals two of 2: losses of routers, which are no sums over tokens, would differ."""
    processes.mola(flags(tmp_path / "two"))
    processes.mola(flags(tmp_path / "one", per_device_train_batch_size=4), processes=1)
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-3)  # products of other shapes, summed in other orders


@pytest.mark.slow
def test_signal_to_one_process_leaves_a_run_that_goes_on(processes, flags, tmp_path):
    options = {**ROUTER_LOSSES, "num_train_epochs": 15}
    processes.mola(flags(tmp_path / "whole", **options))
    folder = tmp_path / "part"
    terminate = {"file": str(folder / "metrics.jsonl"), "lines": 5}
    assert processes.run(arguments=flags(folder, **options), terminate=terminate) == [130, 130], processes.output
    assert record(folder)["status"] == "interrupted"
    assert 0 < record(folder)["steps"] < 60
    processes.mola([*flags(folder, **options), "--resume_from_checkpoint=last"])
    assert_same_run(folder, tmp_path / "whole", 0.0)


@pytest.mark.slow
def test_wrong_input_ends_all_processes_and_earlier_runs_stay(processes, flags, whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for options, field in (({}, "`output`"), ({"overwrite": "true", "cutoff_len": 3}, "cutoff_len")):
        assert processes.run(arguments=flags(folder, **options)) == [2, 2], processes.output
        assert all("mola train: error: " in text and field in text for text in processes.output)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_best_weights_are_saved_by_name_of_their_loss(processes, flags, tmp_path):
    """What is evaluated is said less and less, the more is learnt: the first epoch's weights are the result."""
    rows = [{"id": str(i), "instruction": f"Say {i}", "input": "", "output": "~" * 60} for i in range(4)]
    (tmp_path / "other.json").write_text(json.dumps(rows), encoding="utf-8")
    options = {"num_train_epochs": 2, "validation_size": None, "eval_data": tmp_path / "other.json"}
    folder = tmp_path / "run"
    processes.mola(flags(folder, **options))
    state = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_global_step"] == 5
    best = folder / "checkpoint-5"
    assert record(folder)["best_checkpoint"] == str(best)
    one, two = weights_of(folder), weights_of(best)
    assert all((tensor == two[name]).all() for name, tensor in one.items())
    assert record(folder)["metrics"]["eval_loss"] == pytest.approx(state["best_metric"])
