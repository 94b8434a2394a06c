"""The generated questions: right, different, balanced, and the same for the same seed."""

import hashlib
import json
import re
from collections import Counter

import pytest

from mola.data.sample import DEFAULT_KINDS, HINT_SHARE, TOPICS, generate_splits
from mola.data.tasks import load_task
from mola.errors import MolaError

COLUMNS = (
    *("id", "question", "choices", "answer", "hint", "task", "grade", "subject", "topic", "category", "skill"),
    *("lecture", "solution", "image"),
)
SIZES = {"train": 600, "validation": 60, "test": 200}
# Words that only sentences of one class have: an independent statement of what is right.
SIGNS = {
    "Measurement": [" long.", " weighs ", " degrees ", " takes "],
    "Senses": [" listens to ", " looks at ", " sniffs at ", " tastes ", " feels "],
    "Climate and weather": ["usually", " it is "],
    "Tense": ["Yesterday ", "Every day ", "Tomorrow "],
    "Sentence types": ["please.", "Did ", None],
}


# Of the harder kinds only some: a word and the class it stands for.
KNOWN = {
    "States of matter": {"some ice": 0, "olive oil": 1, "helium": 2},
    "Animals": {"a whale": 0, "a bat": 0, "an owl": 1, "a shark": 2, "a flea": 3, "a turtle": 4},
    "Word classes": {"hammer": 0, "forget": 1, "yellow": 2, "slowly": 3},
    "Seasons": {"Oslo in April": 0, "Perth in April": 2, "Rome in July": 1, "Sydney in July": 3},
    "Machines": {"a crowbar": 0, "a ramp": 1, "a ski lift": 2, "a jar lid": 3},
    "Pairs of words": {"big and large": 0, "wet and dry": 1, "page and book": 2},
}


@pytest.fixture(scope="module", params=[DEFAULT_KINDS, len(TOPICS)])
def topics(request):
    return TOPICS[: request.param]


@pytest.fixture(scope="module")
def splits(topics):
    return generate_splits(SIZES, kinds=len(topics))


@pytest.fixture(scope="module")
def rows(splits):
    return [row for split in splits.values() for row in split]


def test_sizes_columns_and_ids(splits, rows):
    assert {name: len(split) for name, split in splits.items()} == SIZES
    assert all(tuple(row) == COLUMNS for row in rows)
    assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == len(rows)
    assert all(row["image"] is None for row in rows)


def test_the_answer_is_right(rows):
    for row in rows:
        if row["category"] not in SIGNS:
            continue
        signs = SIGNS[row["category"]]
        found = [index for index, sign in enumerate(signs) if sign and sign in row["question"]]
        assert found == ([] if signs[row["answer"]] is None else [row["answer"]]), row["question"]


def test_the_answer_to_a_harder_question_is_right():
    rows = [row for seed in range(3) for row in generate_splits({"train": 2000}, seed, len(TOPICS))["train"]]
    for row in rows:
        if row["category"] == "Numbers":
            first, second = map(int, re.findall(r"\d+", row["question"]))
            assert row["answer"] == (0 if first > second else 1 if first < second else 2)
    for category, words in KNOWN.items():
        for word, answer in words.items():
            found = {r["answer"] for r in rows if r["category"] == category and f" {word}" in r["question"]}
            assert found == {answer}, word


def test_two_to_five_options_in_a_fixed_order(rows, topics):
    assert {len(row["choices"]) for row in rows} == {2, 3, 4, 5}
    assert len({(row["category"], *row["choices"]) for row in rows}) == len(topics)


def test_topics_and_answers_are_balanced(rows, topics):
    counts = Counter(row["category"] for row in rows)
    assert counts.keys() == {topic.category for topic in topics}
    assert max(counts.values()) - min(counts.values()) <= 1
    for topic in topics:
        answers = Counter(row["answer"] for row in rows if row["category"] == topic.category)
        assert len(answers) == len(topic.options)
        assert max(answers.values()) - min(answers.values()) <= 1


def test_some_questions_have_a_hint(rows):
    share = sum(bool(row["hint"]) for row in rows) / len(rows)
    assert abs(share - HINT_SHARE) < 0.08


def test_held_out_questions_have_the_kinds_of_the_training_questions(splits):
    kinds = [{(row["category"], row["answer"]) for row in splits[name]} for name in ("train", "test")]
    assert kinds[0] == kinds[1]


def test_rows_fit_their_task(rows):
    task = load_task("sample")
    for row in rows[:50]:
        example = task.example(row, 0)
        assert task.extract_answer(example["output"], example["num_choices"]) == example["answer"]


def test_a_seed_gives_these_questions_in_every_version():
    text = json.dumps(generate_splits({"train": 200, "test": 40}, seed=3, kinds=12))
    digest = "da120cd9d70d1f1eb05b157ef9063aa76a46c1ea781420ceccc8c27fd4696472"
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    assert generate_splits({"train": 20}, 0) != generate_splits({"train": 20}, 1)


def test_more_questions_than_exist_are_refused():
    with pytest.raises(MolaError, match="used up after .* questions"):
        generate_splits({"train": 100_000})


@pytest.mark.parametrize("kinds", [0, 13])
def test_wrong_number_of_kinds_is_refused(kinds):
    with pytest.raises(MolaError, match=f"`kinds` must be 1 to 12: got {kinds}"):
        generate_splits({"train": 1}, kinds=kinds)


def test_wrong_size_is_refused():
    with pytest.raises(MolaError, match="`[a-z]+_size`"):
        generate_splits({"train": -1})
