import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mola.data.sample import TOPICS, generate_splits, max_questions
from mola.errors import MolaError

COLUMNS = [
    "id",
    "question",
    "choices",
    "answer",
    "hint",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
    "image",
]
SIZES = {"train": 600, "validation": 60, "test": 200}


def _parts(row):
    """What is asked, and the thing in each box, read back from the text."""
    text = f"{row['hint']} {row['question']}"
    asked = re.search(r"Which box has (.+)\?$", text).group(1)
    return asked, dict(re.findall(r"The ([a-z ]+) is in (box [A-E])\.", text))


@pytest.fixture(scope="module")
def splits():
    return generate_splits(SIZES)


@pytest.fixture(scope="module")
def rows(splits):
    return [row for split in splits.values() for row in split]


def test_sizes_columns_and_ids(splits, rows):
    assert {name: len(split) for name, split in splits.items()} == SIZES
    assert all(list(row) == COLUMNS for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["image"] is None for row in rows)


def test_answer_is_the_only_right_choice(rows):
    groups = {(topic.category, asked): things for topic in TOPICS for asked, things in topic.groups.items()}
    for row in rows:
        asked, boxes = _parts(row)
        right = [box for thing, box in boxes.items() if thing in groups[row["category"], asked]]
        assert right == [row["choices"][row["answer"]]]
        assert sorted(boxes.values()) == row["choices"]


def test_no_question_is_asked_twice_whatever_the_boxes(rows):
    keys = Counter((asked, frozenset(boxes)) for asked, boxes in map(_parts, rows))
    assert max(keys.values()) == 1


def test_letters_are_balanced_for_every_number_of_options(rows):
    assert {len(row["choices"]) for row in rows} == {2, 3, 4, 5}
    for num_options in (2, 3, 4, 5):
        counts = Counter(row["answer"] for row in rows if len(row["choices"]) == num_options)
        assert max(counts.values()) - min(counts[index] for index in range(num_options)) <= 1


def test_topics_are_balanced_and_some_questions_have_no_hint(rows):
    counts = Counter(row["category"] for row in rows)
    assert len(counts) == len(TOPICS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert 0.6 < sum(bool(row["hint"]) for row in rows) / len(rows) < 0.8


def test_held_out_questions_ask_for_what_training_taught(splits):
    taught = {_parts(row)[0] for row in splits["train"]}
    assert {_parts(row)[0] for row in splits["test"]} <= taught


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.sampled_from(["train", "validation", "test"]), st.integers(0, 40)), st.integers())
def test_same_seed_same_questions(sizes, seed):
    assert generate_splits(sizes, seed) == generate_splits(dict(sizes), seed)


def test_other_seed_other_questions():
    assert generate_splits({"train": 20}, 0) != generate_splits({"train": 20}, 1)


def test_the_promised_number_can_be_generated():
    splits = generate_splits({"train": max_questions()})
    assert len({_parts(row)[0] + str(sorted(_parts(row)[1])) for row in splits["train"]}) == max_questions()


def test_more_than_exist_is_refused():
    total = max_questions() + 1
    with pytest.raises(MolaError, match=f"asks for {total} questions, but at most {total - 1}"):
        generate_splits({"train": total - 1, "test": 1})


@pytest.mark.parametrize("size", [-1, 2.0, True, None])
def test_wrong_size_is_refused(size):
    with pytest.raises(MolaError, match="`sizes`"):
        generate_splits({"train": size})
