import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mola.data.write import schema_of, write_splits
from mola.errors import MolaError

PROMPT = {"input": "", "instruction": "i", "output": "o"}


def test_empty_split_can_be_loaded_again(tmp_path):
    write_splits({"train": [{"a": 1, **PROMPT}], "test": []}, tmp_path / "out")
    saved = datasets.load_from_disk(str(tmp_path / "out" / "dataset.hf"))
    assert len(saved["test"]) == 0
    assert saved["test"].features == saved["train"].features
    assert (tmp_path / "out" / "test.json").read_text() == "[]"


# Half of a surrogate pair is a text for Python, but not for a file: see below.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
COLUMN = st.sampled_from(
    [st.none() | TEXT, st.lists(TEXT), st.none() | st.integers(-(2**63), 2**63 - 1), st.booleans()]
)


@settings(max_examples=25, deadline=None)  # every example writes files
@given(data=st.data(), kinds=st.lists(COLUMN, min_size=1, max_size=4), split_at=st.integers(0, 5))
def test_json_and_dataset_hold_what_was_put_in(tmp_path_factory, data, kinds, split_at):
    columns = st.fixed_dictionaries({f"c{index}": kind for index, kind in enumerate(kinds)})
    rows = [{**row, **PROMPT} for row in data.draw(st.lists(columns, min_size=1, max_size=6))]
    out = tmp_path_factory.mktemp("w") / "out"
    splits = {"a": rows[:split_at], "b": rows[split_at:]}
    write_splits(splits, out)
    saved = datasets.load_from_disk(str(out / "dataset.hf"))
    for name, expected in splits.items():
        assert json.loads((out / f"{name}.json").read_text()) == expected
        assert saved[name].to_list() == expected


def test_types_come_from_the_rows_of_all_splits():
    rows = [
        {"y": 1, "a": None if number < 2400 else [0.5], "b": 1 if number % 2 else 2.5, "extra": None}
        for number in range(2500)
    ]
    schema = schema_of({"train": rows[:2000], "test": rows[2000:]}, first=["z"], last=["y"])
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        **{"z": "null", "a": "list<item: double>", "b": "double", "extra": "null", "y": "int64"}
    }
    assert schema.names == ["z", "a", "b", "extra", "y"]


@pytest.mark.parametrize("other", ["text", [1], {"a": 1}, True])
def test_values_of_different_kinds_name_the_column(tmp_path, other):
    with pytest.raises(MolaError, match="one kind in every column: `a`"):
        write_splits({"train": [{"a": 1, **PROMPT}] * 1500, "test": [{"a": other, **PROMPT}]}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
