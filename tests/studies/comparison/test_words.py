"""Tables and words of comparisons on free text, where a lower loss is better."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

from mola.options.parsing import parse
from mola.studies.comparison.conclusion import conclusion
from mola.studies.comparison.options import CompareOptions
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.search import search_notes, search_results, search_table
from mola.studies.comparison.tables import ALL_TASKS, comma_separated, markdown, summarize
from tests.studies.comparison.comparisons import RECIPES

SEARCH = {"learning_rate": [0.001, 0.01]}
TOKENS = [5, 10, 20, 40] * 10


def result(recipe, seed, loss, task="notes", noise=0.01):
    """A run on free text, with this loss per token."""
    spread = np.random.default_rng([seed, *recipe.encode()]).normal(size=len(TOKENS)) * TOKENS
    losses = [float(each) for each in np.multiply(TOKENS, loss) + noise * (spread - spread.mean())]
    return Result(
        task,
        recipe,
        seed,
        accuracy=None,
        correct=None,
        total=len(TOKENS),
        unanswered=None,
        marks=None,
        trainable_parameters=100,
        num_experts=[1],
        eval_loss=None,
        seconds_training=1.0,
        seconds_testing=1.0,
        settings={},
        fingerprints={},
        versions={},
        machine={"cpu": "a cpu", "gpu": None, "threads": 1},
        loss=sum(losses) / sum(TOKENS),
        losses=losses,
        tokens=TOKENS,
    )


def results(lora, mixture, task="notes"):
    runs = [result(name, seed, loss, task) for seed in range(3) for name, loss in (("lora", lora), ("2468", mixture))]
    return [result(BASE, 0, 4.0, task, noise=0), *runs]


def rows_of(found, tasks=("notes",)):
    return summarize(found, ["lora", "2468"], tasks, "lora")


@pytest.fixture
def words(tiny_model_dir, tmp_path):
    def say(found, **changes):
        given = {"base_model": str(tiny_model_dir), "data": "notes.jsonl", "output_dir": str(tmp_path / "out")}
        options = CompareOptions(**{**given, "recipes": RECIPES, "tune": SEARCH, **changes})
        return "\n".join(conclusion(options, rows_of(found), found))

    return say


@pytest.mark.parametrize(
    ("mixture", "verdict", "said", "kept"),
    [
        (
            1.5,
            "better",
            "is 0.500 nats per token lower than that of lora (joint 95 % interval: 0.50",
            "2468 is better.",
        ),
        (2.5, "worse", "is 0.500 nats per token higher than that of lora (joint 95 % interval: 0.49", "2468 is worse."),
    ],
)
def test_a_lower_loss_is_better_in_table_and_words(mixture, verdict, said, kept, words):
    found = results(2.0, mixture)
    table = markdown(rows_of(found), [], "lora", found, 0)
    sign = "−" if mixture < 2 else "+"
    (line,) = [line for line in table.splitlines() if line.startswith("| notes | 2468 |")]
    assert "| loss | perplexity | difference | 95 % | verdict |" in table
    assert f"| {sign}0.500 | {sign}0." in line
    assert line.endswith(f"| {verdict} |")
    text = words(found)
    assert said in text
    assert f"{verdict}." in text
    assert kept in text
    assert (
        "Keep 2468: it is better than lora." if mixture < 2 else "Keep lora: no recipe is shown to be better."
    ) in text


def next_options(text):
    """What the printed command means."""
    (line,) = [line for line in text.splitlines() if line.startswith("Next: ")]
    program, name, *words = shlex.split(line.removeprefix("Next: "))
    assert (program, name) == ("mola", "compare")
    return parse(CompareOptions, words, prog="mola compare")


def test_sizes_that_differ_give_no_recipe_to_keep(words):
    found = [replace(each, trainable_parameters=4000 if each.recipe == "2468" else 1000) for each in results(2.0, 1.5)]
    text = words(found)
    assert "2468 is better." in text  # the difference is still said
    assert "Keep" not in text
    assert (
        "- The recipes differ in size: lora trains 0.001 M parameters, 2468 0.004 M. A larger recipe may be better by "
        "its size alone." in text
    )
    assert "Learning rates: lora 0.0003, 2468 0.0003 (each the best that the search tried)." in text
    asked = next_options(text)
    assert asked.recipes == {"lora": {"num_experts": "1", "r": "64", "lora_alpha": 64.0}, "2468": RECIPES["2468"]}
    assert asked.output_dir.endswith("out-2")
    note = "On notes, the recipes differ in size: lora trains 0.001 M parameters, 2468 0.004 M."
    assert note in markdown(rows_of(found), [], "lora", found, 0)


@pytest.mark.parametrize("where", ["for all", "recipe"])
def test_a_rate_that_was_not_searched_gives_no_recipe_to_keep(where, words):
    recipes = {"lora": {**RECIPES["lora"], "learning_rate": 0.002}, "2468": RECIPES["2468"]}
    changes = {"learning_rate": 0.002} if where == "for all" else {"recipes": recipes}
    runs = [replace(each, settings={"learning_rate": 0.002}) for each in results(2.0, 1.5)]
    text = words(runs, tune=None, seeds=[0, 1, 2, 3], keep_adapters=False, **changes)
    assert "2468 is better at this learning_rate." in text
    assert "Keep" not in text
    assert "Learning rates: lora 0.002, 2468 0.002 (not searched)." in text
    assert "- One learning rate was tried, which may suit one recipe better than another." in text
    asked = next_options(text)
    assert json.loads(asked.tune) == {"learning_rate": [0.0003, 0.001, 0.003]}
    assert (asked.seeds, asked.keep_adapters, asked.recipes) == ([0, 1, 2, 3], False, RECIPES)
    assert len(asked.tuning_runs) == 12  # 3 rates, 2 recipes, 2 seeds


@pytest.mark.parametrize("steps", [-1, 40])
def test_a_run_that_has_not_learnt_gives_no_recipe_to_keep(steps, words):
    seen = "The training loss has hardly fallen: from 2.00 to 1.95."
    found = [
        replace(each, not_learnt=seen) if (each.recipe, each.seed) == ("2468", 1) else each
        for each in results(2.0, 2.0)
    ]
    text = words(found, max_steps=steps)
    assert f"- 1 of 6 runs have not learnt their data (2468). 2468 with seed 1: {seen}" in text
    assert "Keep" not in text
    asked = next_options(text)
    assert (asked.max_steps, asked.num_train_epochs) == ((80, 3) if steps > 0 else (-1, 6))
    assert json.loads(asked.tune) == SEARCH


def test_what_is_not_shown_to_differ_has_a_bound(words):
    text = words(results(2.0, 2.0))
    assert "lower to 0.0" in text  # the interval has 0 inside
    assert ": not shown to differ, no difference above 0.0" in text
    assert "Keep lora: no recipe is shown to be better." in text


def test_a_training_that_did_not_help_is_named(words):
    found = [replace(each, loss=1.0) if each.recipe == BASE else each for each in results(2.0, 1.5)]
    assert "But the training has not helped: loss of the base model alone and of 2468: 1.000 and 1.500." in words(found)


def test_a_seed_that_diverged_leaves_its_recipe_without_a_verdict(words):
    found = results(2.0, 1.5)
    lost = {"loss": None, "losses": None, "tokens": None, "diverged_at": 3}
    found = [replace(each, **lost) if (each.recipe, each.seed) == ("2468", 1) else each for each in found]
    rows = rows_of(found)
    text = markdown(rows, [], "lora", found, 0)
    assert "| – | – |  |  | diverged: no verdict |" in text
    assert "2468 on notes diverged with seed 1: it has no loss, and its recipe no verdict." in text
    assert comma_separated(rows).splitlines()[2].split(",")[5:8] == ["", "", ""]
    assert words(found) == ""


def test_a_search_takes_the_lowest_loss_of_trainings_that_did_not_diverge(tiny_model_dir, tmp_path):
    options = CompareOptions(
        base_model=str(tiny_model_dir),
        data="notes.jsonl",
        output_dir=str(tmp_path),
        recipes={"lora": RECIPES["lora"]},
        tune={"weight_decay": [0.0, 0.1, 0.2]},
        tuning_seeds=[7, 8],
    )
    losses = {0.0: (2.0, 1.0), 0.1: (1.4, 1.4), 0.2: (1.0, None)}
    found = []
    for decay, of_seeds in losses.items():
        for seed, loss in zip((7, 8), of_seeds, strict=True):
            run = result(f"lora@weight_decay={decay}", seed, loss or 1.0)
            lost = {"loss": None, "losses": None, "tokens": None, "diverged_at": 1}
            found.append(run if loss else replace(run, **lost))
    (chosen,) = search_results(options, found)
    assert chosen.chosen == "@weight_decay=0.1"
    assert chosen.losses["@weight_decay=0.0"] == pytest.approx(1.5)
    _, ((*_, no_decay, _, diverged, best),) = search_table([chosen])
    assert (no_decay, diverged, best) == ("1.500", "– (diverged)", "weight_decay=0.1")
    assert [note.partition(" over")[0] for note in search_notes([chosen])] == ["Search: mean loss in nats per token"]


def test_losses_of_tasks_are_not_averaged():
    found = results(2.0, 1.5) + results(1.0, 0.9, task="mails")
    rows = rows_of(found, ("notes", "mails"))
    assert ALL_TASKS not in {row.task for row in rows}
    assert [row.loss for row in rows if row.recipe == "lora"] == pytest.approx([2.0, 1.0], abs=0.01)
