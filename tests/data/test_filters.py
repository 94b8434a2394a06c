"""`filters`: rows by the values of their columns, raw and prepared, on the command line and in Python."""

import json

import pytest

from mola.cli import main
from mola.data.examples import load_examples
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.options.fields import parse_mapping

ROWS = [
    {"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2, "hint": "", "topic": topic, "grade": i}
    for i, topic in enumerate(["physics", "biology", "physics", None, "music"])
]
PREPARED = [{"instruction": f"i{i}", "output": "o", "topic": row["topic"]} for i, row in enumerate(ROWS)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "raw.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "prepared.json").write_text(json.dumps(PREPARED), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["raw.json", "prepared.json"])
@pytest.mark.parametrize(
    ("filters", "limit", "kept"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        ({"topic": "physics"}, None, [0, 2]),
        ({"topic": "physics"}, 1, [0]),
        ({"topic": ["biology", "music"]}, None, [1, 4]),
        ({"topic": None}, None, [3]),
    ],
)
def test_rows_with_the_wanted_values_keep_their_ids(files, name, filters, limit, kept):
    examples = load_examples(files / name, load_task("scienceqa"), "test", limit=limit, filters=filters)
    assert [example["id"] for example in examples] == [f"test-{index}" for index in kept]


def test_filters_of_several_columns_must_all_match(files):
    task = load_task("scienceqa")
    filters = {"topic": "physics", "grade": [1, 2]}
    assert [e["id"] for e in load_examples(files / "raw.json", task, "test", filters=filters)] == ["test-2"]


@pytest.mark.parametrize(
    ("filters", "parts"),
    [
        ({"topc": "physics"}, ["`filters`", "`topc`", "topic"]),
        ({"topic": "art"}, ["`filters`", "'art'", "5 rows", "'physics'", "'music'"]),
        ({"grade": "1"}, ["`filters`", "'1'", "0, 1, 2"]),
        ({"topic": "physics", "grade": 1}, ["`grade` is 1", "2 rows left", "0, 2"]),
    ],
)
def test_filters_that_leave_no_row_list_the_values(files, filters, parts):
    with pytest.raises(MolaError) as caught:
        load_examples(files / "raw.json", load_task("scienceqa"), "test", filters=filters)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_filter_value_that_no_row_has_is_a_warning(files, caplog):
    filters = {"topic": ["physics", "musik"]}
    assert load_examples(files / "raw.json", load_task("scienceqa"), "test", filters=filters)
    assert "no row of" in caplog.text
    assert "has 'musik' as `topic`" in caplog.text


def test_evaluate_takes_filters_from_flags_and_recipes(files, tiny_model_dir, tmp_path):
    arguments = [
        "evaluate",
        f"--base_model={tiny_model_dir}",
        "--task=scienceqa",
        f"--data={files / 'raw.json'}",
        "--scoring=likelihood",
        "--dtype=float32",
    ]
    (tmp_path / "recipe.yaml").write_text("filters: {topic: physics}", encoding="utf-8")
    assert main([*arguments, f"--output={tmp_path / 'a'}", '--filters={"topic": "physics"}']) == 0
    assert main([*arguments, f"--output={tmp_path / 'b'}", f"--config={tmp_path / 'recipe.yaml'}"]) == 0
    one, two = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in "ab")
    assert (one["total"], one["samples"]) == (2, two["samples"])


@pytest.mark.parametrize("value", ["topic", "[1]", '{"a": 1, "a": 2}', [1], {1: 2}])
def test_text_that_is_not_a_mapping_is_refused(value):
    with pytest.raises(MolaError, match="`filters`"):
        parse_mapping("filters", value)


def test_a_system_text_joins_the_chat_unless_it_is_in_the_prompt(tmp_path):
    """As the rows of a task have it that puts it there."""
    rows = [
        {"system": "Be brief.", "instruction": f"{start}Q{i}", "output": "x"}
        for i, start in enumerate(["Be brief.", ""])
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    first, second = load_examples(path, None, None)
    assert (first["instruction"], "messages" in first) == ("Be brief.Q0", False)
    assert [(each["role"], each["content"]) for each in second["messages"]] == [
        ("system", "Be brief."),
        ("user", "Q1"),
        ("assistant", "x"),
    ]


def test_turns_before_an_instruction_become_a_chat(tmp_path):
    rows = [{"instruction": f"Q{i}", "input": "in", "output": "x", "history": ""} for i in range(3)]
    rows[1]["history"] = [["before", "that"]]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    examples = load_examples(path, None, None)
    assert ["messages" in example for example in examples] == [False, True, False]
    assert [each["content"] for each in examples[1]["messages"]] == ["before", "that", "Q1\n\nin", "x"]


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_chat_among_instructions_is_refused(name, tmp_path):
    rows = [{"instruction": f"Q{i}", "output": "x", name: ""} for i in range(3)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert len(load_examples(path, None, None)) == 3
    rows[1][name] = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "x"}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(MolaError, match=f"row 1 of .* it has a value in `{name}`"):
        load_examples(path, None, None)
