"""A real run to report on: a tiny model, generated questions, everything that the commands write."""

import json
import shutil
from pathlib import Path

import pytest

from mola import TrainOptions, train
from mola.data.prepare import PrepareOptions, prepare
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from mola.reporting.inspect import InspectOptions, inspect


@pytest.fixture(scope="session")
def finished_run(tiny_model_dir, tmp_path_factory):
    """Folder of a run with 2, 4, 6 and 8 experts; not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    data, run = folder / "data", folder / "a run"
    prepare(PrepareOptions("sample", str(data), train_size=20, validation_size=4, test_size=8))
    base = {"base_model": str(tiny_model_dir), "task": "sample"}
    # No progress of the tests' own machine: three steps are a curve.
    options = TrainOptions(
        **base,
        data=str(data / "dataset.hf"),
        output_dir=str(run),
        num_experts="2468",
        r="2",
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        load_best_model_at_end=False,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
    )
    train(options)
    test = {"data": str(data / "test.json"), "device": "cpu"}
    for name, adapter in (("before", None), ("after", str(run))):
        evaluate(EvaluateOptions(**base, **test, adapter=adapter, output=str(run / f"{name}.json"), max_new_tokens=3))
    inspect(InspectOptions(**base, **test, adapter=str(run), json=str(run / "inspect.json"), limit=4))
    change(run / "inspect.json", add_leave_one_out)
    return run


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "a run"))


def change(path, edit):
    """Edit a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def add_leave_one_out(found):
    """Changes of the loss that are known, in place of measured ones."""
    sizes = {row["layer_index"]: len(row["shares"]) for row in found["usage"]["all"]}
    found["leave_one_out"] = [
        {"layer_index": layer, "module": None, "expert": expert, "loss_change": 0.001 * (expert - 1)}
        for layer, size in sizes.items()
        for expert in range(size)
    ]
    found["leave_one_out_baseline"] = {"loss": 1.25}
