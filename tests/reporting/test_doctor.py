"""Runs with a planted fault: the doctor names it, and what follows from it. Healthy ones are left alone."""

import json
import os
import random
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from mola import MolaConfig, TrainOptions, train
from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from mola.errors import MolaError
from mola.reporting.doctor import DoctorOptions, doctor
from mola.reporting.findings import find_faults
from mola.reporting.load_run import load_run
from mola.reporting.routing_log import LateUse
from tests.grids import slow

from .conftest import change

TARGETS = "q_proj,v_proj,down_proj"
DEAD, COLLAPSED, LORA = "dead experts", "collapsed routers", "a LoRA would do"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=40, validation_size=8, test_size=4))
    return folder / "dataset.hf"


@pytest.fixture
def run(tiny_model_dir, data, tmp_path):
    """Function: train with some options, and give what the doctor finds."""

    def make(**options):
        defaults = {
            "base_model": str(tiny_model_dir),
            "task": "sample",
            "data": str(data),
            "output_dir": str(tmp_path / "run"),
            "max_steps": 12,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        if "adapter" not in options:
            defaults |= {"num_experts": "4", "r": "2", "target_modules": TARGETS}
        train(TrainOptions(**defaults | options))
        return [found.name for found in doctor(DoctorOptions(str(tmp_path / "run")))]

    return make


@pytest.fixture
def planted(tiny_model_dir, tmp_path):
    """Function: an adapter whose routers, or experts, a function has set; by `mola_router`, `mola_A` or `mola_B`."""

    def make(num_experts, top_k, values):
        model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        config = MolaConfig(
            num_experts=num_experts, top_k=top_k, r=2, target_modules=TARGETS.split(","), task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                part = next((part for part in values if part in name), None)
                if part:
                    parameter.copy_(values[part](parameter))
        adapted.save_pretrained(str(tmp_path / "planted"))
        return str(tmp_path / "planted")

    return make


def one_and_its_opposite(router):
    """Every token chooses one of the first two, and the third: of two equal ones the first is taken."""
    return torch.stack([router[0], -router[0], *torch.zeros_like(router[2:])])


QUIET = {
    "learning_rate": 1e-7,
    "max_steps": 1,
    "warmup_steps": 0,
}  # seen before a step changes it


@pytest.mark.parametrize(
    "options",
    [{}, *slow({"num_experts": "2", "learning_rate": 1e-2}, {"top_k": "1", "router_aux_loss_coef": 1e-2})],
    ids=str,
)
def test_healthy_runs_have_no_findings(options, run):
    assert set(run(**options)) <= {"not learnt"}  # twelve steps are few


@pytest.mark.slow
def test_learning_rate_too_high(run, tmp_path):
    assert run(learning_rate=2e-2, max_steps=20, r="16", target_modules="all-linear") == []
    (tmp_path / "run").rename(tmp_path / "before")
    found = run(adapter=str(tmp_path / "before"), learning_rate=0.3, lr_scheduler_type="constant", max_steps=12)
    assert "learning rate too high" in found


@pytest.mark.slow
def test_evaluation_loss_far_above_training_loss(run, data, tmp_path):
    rows = json.loads((data.parent / "test.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{**row, "output": "~}{|" * 5} for row in rows]))
    found = run(
        learning_rate=2e-2, max_steps=40, eval_data=str(other), eval_split="train", eval_strategy="steps", eval_steps=40
    )
    assert found == ["evaluation loss far above training loss"]


def test_one_expert_per_token_without_balance_loss(run):
    with pytest.warns(UserWarning, match="`top_k=1`"):
        assert run(top_k="1") == ["top_k 1 without balance loss"]


@pytest.mark.slow
def test_one_expert_per_token_in_some_modules(run):
    with pytest.warns(UserWarning, match="`top_k=1`"):
        found = run(num_experts="1", num_experts_pattern='{"down_proj": 4}', top_k="1", router_z_loss_coef=1e-3)
    assert "top_k 1 without balance loss" in found


def test_collapsed_routers(run, planted):
    found = run(adapter=planted(4, 2, {"mola_router": torch.zeros_like}), **QUIET)
    assert found == [COLLAPSED, DEAD, LORA]  # all tokens get the first two, half and half


def test_dead_experts(run, planted):
    assert run(adapter=planted(4, 2, {"mola_router": one_and_its_opposite}), **QUIET) == [DEAD]


def test_experts_that_are_alike(run, planted):
    same = {"mola_A": lambda A: A[:1].expand_as(A), "mola_B": lambda B: torch.randn_like(B[:1]).expand_as(B)}
    assert run(adapter=planted(3, 2, same), **QUIET) == ["experts alike"]


def test_gates_that_are_always_equal(run, planted):
    assert run(adapter=planted(2, 2, {"mola_router": torch.zeros_like}), **QUIET) == [LORA]


def test_an_exported_lora_that_answers_as_well(finished_run, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    export = {
        "method": "regression",
        "rank": 8,
        "accuracy": {},
        "differences": {"lora": {"value": -0.01, "questions_95": [-0.04, 0.02]}},
        "divergence": {"test answer": 0.002},
        "explained_by_kind": {},
        "loss": {},
    }
    path = tmp_path / "export.json"
    path.write_text(json.dumps(export))
    options = DoctorOptions(str(folder), export=str(path))
    (found,) = [each for each in doctor(options) if each.name == LORA]
    assert "differs by -1.0 points (95 % -4.0 to +2.0)" in found.seen
    assert "0.0020 nats per answer token" in found.seen
    change(path, lambda content: content["differences"]["lora"].update(value=-0.03))
    assert LORA not in [each.name for each in doctor(options)]
    change(path, lambda content: content.update(differences={}))
    assert main(["doctor", str(folder), "--export", str(path)]) == 0
    assert "Not looked at: whether a LoRA answers as well (no answers to a `test`" in capsys.readouterr().out


def test_the_command_prints_findings_and_missing_parts(finished_run, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    assert main(["doctor", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "Nothing was found wrong" in printed
    assert "Not looked at: whether a LoRA answers as well" in printed
    assert json.loads((tmp_path / "found.json").read_text()) == {"run": str(folder), "findings": []}
    before = (folder / "run.json").read_bytes()
    assert main(["doctor", str(folder), "--json", str(folder / "run.json")]) == 2
    assert "`json` must be a new file" in capsys.readouterr().err
    assert (folder / "run.json").read_bytes() == before
    assert main(["doctor", str(folder), "--json", str(tmp_path / "found.json"), "--overwrite"]) == 0
    capsys.readouterr()
    (folder / "routing.jsonl").unlink()
    change(folder / "adapter_config.json", lambda content: content.update(top_k=1))
    assert main(["doctor", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "1. top_k 1 without balance loss" in printed
    assert "--router_aux_loss_coef 1e-3" in printed
    assert "Not looked at: routers over training" in printed


def test_one_answer_to_everything(run_dir, capsys):
    def alike(content):
        sample = content["samples"][0] | {"predicted": "A"}
        samples = [sample | {"answer": letter, "correct": letter == "A"} for letter in "ABBB" * 5]
        content.update(samples=samples, total=20, correct=5, accuracy=0.25)

    change(run_dir / "after.json", alike)
    (found,) = doctor(DoctorOptions(str(run_dir)))
    assert (found.name, found.seen) == (
        "one answer to everything",
        "All 20 samples of after.json got 'A', which is correct for 25.0% of them.",
    )
    change(run_dir / "after.json", lambda content: content["settings"].update(adapter="another"))
    assert main(["doctor", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "Nothing was found wrong" in printed
    assert (
        "Not looked at: answers to a test (no after.json of `mola evaluate`, or one of a different adapter)." in printed
    )


def log(folder, training, *more):
    """Write a metrics.jsonl with (step, loss) of the training, then further entries."""
    entries = [*({"step": step, "loss": loss} for step, loss in training), *more]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def names(found):
    return [each.name for each in found]


def test_a_run_that_failed(finished_run, tmp_path, tiny_model_dir, data):
    folder = tmp_path / "run"
    values = {"base_model": str(tiny_model_dir), "task": "sample", "data": str(data), "output_dir": str(folder)}
    values |= {"learning_rate": 1e30, "max_steps": 20, "logging_steps": 2, "use_cpu": True, "disable_tqdm": True}
    values |= {"dtype": "float32"}  # in bfloat16 the loss of some processors stays a number
    with pytest.raises(MolaError, match="training has diverged"):
        train(TrainOptions(**values, num_experts="4", r="2", target_modules=TARGETS, eval_strategy="no"))
    first = doctor(DoctorOptions(str(folder)))[0]
    assert first.name == "the run failed"
    assert "training has diverged" in first.seen
    assert main(["report", str(folder)]) == 0


def test_a_running_run(run_dir, capsys):
    change(run_dir / "run.json", lambda content: content.update(status="running"))
    log(run_dir, [(1, 1.9), (2, 0.7), (3, 9.8)])
    assert main(["doctor", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "Not looked at: the rest of the training (`status` in run.json is running)." in printed
    assert "Not looked at: the training loss (fewer than 4 entries in metrics.jsonl)." in printed


def healthy_batches(seed):
    """A low first loss, then healthy losses of single batches, logged at every step."""
    draw = random.Random(seed)
    return [0.1, *(max(0.05, draw.gauss(1.1 - step / 4000, 0.4)) for step in range(400))]


# Losses of single samples of two kinds, as logged at a rate of 1e-4.
NOISY = [5.57, 2.4, 0.95, 4.46, 3.48, 4.72, 1.22, 1.09, 0.73, 0.7]
NOISY += [5.61, 0.9, 5.2, 1.1, 4.9, 5.57, 0.96, 5.45, 0.68, 5.4]


@pytest.mark.parametrize(
    ("values", "is_found"),
    [
        (NOISY, False),
        (healthy_batches(0), False),
        *slow((healthy_batches(1), False), (healthy_batches(2), False)),
        ([2.0, 1.5, 1.1, 1.0, 0.9, 0.95, 5.0, 7.5, 7.1, 7.3, 7.2, 7.4], True),
        ([0.5, *(0.5 + 2.5 * min(1, step / 20) for step in range(1, 100))], True),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_losses_that_rise(values, is_found, run_dir):
    log(run_dir, [(step, loss) for step, loss in enumerate(values, 1)])
    assert ("learning rate too high" in names(doctor(DoctorOptions(str(run_dir))))) == is_found


GAP = "evaluation loss far above training loss"


def test_the_evaluation_after_training_counts_for_the_best_step(run_dir):
    """The best weights are evaluated once more at the end: logged there, it is none of the last weights."""
    training = [(10, 1.0), (20, 0.9), (30, 0.3), (40, 0.1), (50, 0.1)]
    evaluation = [{"step": 20, "eval_loss": 0.95}, {"step": 50, "eval_loss": 1.8}]
    log(run_dir, training, *evaluation, {"step": 50, "train_loss": 0.5}, {"step": 50, "eval_loss": 0.95})
    change(run_dir / "run.json", lambda content: content.update(best_checkpoint="run/checkpoint-20"))
    assert GAP not in names(doctor(DoctorOptions(str(run_dir))))
    assert load_run(str(run_dir)).curves["evaluation"] == [(20, 0.95), (50, 1.8)]
    change(run_dir / "run.json", lambda content: content.update(best_checkpoint=None))
    log(run_dir, training, *evaluation, {"step": 50, "train_loss": 0.5})
    assert GAP in names(doctor(DoctorOptions(str(run_dir))))


@pytest.mark.parametrize(
    ("training", "evaluation", "best", "seen"),
    [
        ([(10, 1.15), (19, 0.5)], [(10, 1.2)], None, None),  # losses after the last evaluation do not count
        ([(10, 0.9), (20, 0.8)], [(0, 3.4)], None, None),  # an evaluation before training
        ([(10, 0.9), (20, 0.3)], [(8, 3.0), (16, 3.5)], 8, "3.0000 at step 8, training 0.9000"),
    ],
)
def test_evaluations_are_compared_with_the_losses_before_them(training, evaluation, best, seen, run_dir, capsys):
    log(run_dir, training, *({"step": step, "eval_loss": loss} for step, loss in evaluation))
    checkpoint = None if best is None else f"run/checkpoint-{best}"
    change(run_dir / "run.json", lambda content: content.update(status="running", best_checkpoint=checkpoint))
    assert [each.seen[: len(seen)] for each in doctor(DoctorOptions(str(run_dir))) if each.name == GAP] == (
        [] if seen is None else [seen]
    )
    assert main(["doctor", str(run_dir)]) == 0
    assert ("Not looked at: the evaluation loss" in capsys.readouterr().out) == (evaluation == [(0, 3.4)])


def test_telemetry_that_ends_early_is_not_looked_at(finished_run, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    change(folder / "run.json", lambda content: content.update(steps=1000))
    assert main(["doctor", str(folder)]) == 0
    assert "Not looked at: routers in the last quarter of training" in capsys.readouterr().out


def test_an_outdated_export_is_not_looked_at(finished_run, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    difference = {"lora": {"value": 0.0, "questions_95": [-0.2, 0.2]}}
    export = {"method": "regression", "rank": 8, "accuracy": {}, "differences": difference}
    export |= {"divergence": {"answer": 0.002}, "explained_by_kind": {}, "loss": {}}
    (folder / "export.json").write_text(json.dumps(export), encoding="utf-8")
    assert LORA in [each.name for each in doctor(DoctorOptions(str(folder)))]
    os.utime(folder / "export.json", (0, 0))
    assert main(["doctor", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert LORA not in printed
    assert "its export.json is older than the adapter" in printed
    # One that is named is looked at: a folder that was copied has other times.
    assert main(["doctor", str(folder), "--export", str(folder / "export.json")]) == 0
    assert LORA in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "edit", "advice"),
    [
        ("adapter_config.json", {"num_experts_pattern": None}, "`mola reallocate"),
        ("adapter_config.json", {"num_experts_pattern": {"q_proj": 2}}, "linears (`num_experts_pattern`)"),
        ("run.json", {"router_aux_loss_coef": 0}, "Switch the balance loss on"),
        ("run.json", {"router_aux_loss_coef": 0.05}, "--router_aux_loss_coef, 0.05 now"),
    ],
)
def test_advice_on_experts_that_are_not_chosen(file, edit, advice, run_dir):
    change(run_dir / file, lambda content: content.get("adapter_settings", content).update(edit))
    dead = {name: LateUse(10, [1.0, 1.0, 0.0, 0.0], 0.5) for name in "ab"}
    found = {each.name: each.change for each in find_faults(load_run(str(run_dir)), dead)}
    assert advice in found[DEAD]
    if file == "run.json":
        assert advice in found[COLLAPSED]


@pytest.mark.parametrize(
    ("use", "is_found"),
    [
        # Of 32 chosen experts a fresh router's two largest gates are 0.02 apart, of two 0.2.
        (LateUse(10, [2 / 64] * 64, 0.019), True),
        (LateUse(10, [2 / 64] * 64, 0.2), False),
        (LateUse(10, [32 / 64] * 64, 0.016), False),
        (LateUse(10, [32 / 64] * 64, 0.001), True),
        # Pairs of equal experts, as `mola reallocate` makes them: the pairs are told apart, or not.
        (LateUse(10, [0.5] * 4, 0.01, 0.95), False),
        (LateUse(10, [0.5] * 4, 0.01, 0.999), True),
    ],
)
def test_gates_that_are_nearly_equal(use, is_found, finished_run):
    assert (LORA in names(find_faults(load_run(str(finished_run)), {"a": use, "b": use}))) == is_found


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(MolaError, match="`run_dir` must be a folder with the run.json"):
        doctor(DoctorOptions(str(tmp_path)))
