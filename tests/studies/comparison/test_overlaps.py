"""Questions are told apart by what they ask, not by ids that a file without ids gets from its split's name."""

import json

import pytest
from datasets import load_from_disk

from mola.errors import MolaError
from mola.studies.comparison.checks import check_runs, check_search
from mola.studies.comparison.options import CompareOptions
from tests.studies.comparison.comparisons import RECIPES

ONE = {"recipes": {"lora": RECIPES["lora"]}, "seeds": [0], "evaluate_base": False}
CHOSEN = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
SEARCHED = {"tune": {"learning_rate": [0.01, 0.02]}, "tuning_seeds": [5], "learning_rate": None}


@pytest.fixture
def copied(data, tmp_path):
    """Write rows of a split to a file of its own, without ids, followed by rows of another; its path."""

    def copy(split, rows=None, more="test", more_rows=0):
        dataset = load_from_disk(str(data))
        found = [*dataset[split].select(range(rows or len(dataset[split]))), *dataset[more].select(range(more_rows))]
        path = tmp_path / f"{split}-{rows}-{more_rows}.json"
        path.write_text(json.dumps([{name: value for name, value in row.items() if name != "id"} for row in found]))
        return path

    return copy


def tasks(test_data, **options):
    return {"questions": {"task": "sample", "test_data": str(test_data), **options}}


@pytest.mark.parametrize("rows", [None, 4])
def test_a_search_on_the_rows_of_the_test_is_refused(run, copied, rows):
    with pytest.raises(MolaError, match="`tuning_split` .'validation'. has the test questions"):
        run(**{**ONE, **SEARCHED, "tasks": tasks(copied("validation", rows))})


def test_a_checkpoint_chosen_by_the_rows_of_the_test_is_refused(run, copied):
    with pytest.raises(MolaError, match="`load_best_model_at_end` would choose a checkpoint by the test questions of"):
        run(**{**ONE, **CHOSEN, "tasks": tasks(copied("validation", 4))})


@pytest.mark.parametrize(
    ("changes", "more", "where"),
    [
        ({}, "train", "trained on"),
        (CHOSEN, "validation", "evaluation data, by which a checkpoint is chosen"),
        (SEARCHED, "validation", "in `tuning_split` ('validation')"),
    ],
)
def test_shared_questions_give_one_warning(values, copied, caplog, changes, more, where):
    options = CompareOptions(**values(**{**ONE, **changes, "tasks": tasks(copied("test", 5, more, 3))}))
    check_search(check_runs(options.tuning_runs), check_runs(options.runs))
    said = [record.message for record in caplog.records if "if they were new" in record.message]
    assert said == [
        f"task `questions`: 3 of the 8 test questions are also {where}. The result counts them as if they were new."
    ]
