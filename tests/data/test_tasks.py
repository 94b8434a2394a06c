import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from mola.data.tasks import load_task, task_names
from mola.errors import MolaError

ROW = {
    "id": 17,
    "image": None,
    "hint": "  Plants need light. ",
    "question": "Which plant grows?",
    "choices": ["the fern", "the  rock", "a pen"],
    "answer": 0,
    "subject": "natural science",
    "topic": None,
    "lecture": "not used",
}
INSTRUCTION = (
    "Context: Plants need light.\nQuestion: Which plant grows?\nOptions: (A) the fern (B) the  rock (C) a pen\n"
)
PAIR = {
    "name": "pair",
    "version": 1,
    "template": "alpaca",
    "columns": ["sentence1", "sentence2", "label"],
    "answer": {"column": "label", "words": {0: "No", 1: "Yes"}},
    "instruction": "Same meaning?\n1: {sentence1}\n2: {sentence2}\n",
    "output": "The answer is {answer}.",
    "answer_pattern": r"The answer is (Yes|No)\b",
    "metric": "accuracy",
}


@pytest.fixture(scope="module")
def scienceqa():
    return load_task("scienceqa")


def write_task(folder: Path, changes=None, drop=()) -> Path:
    data = {key: value for key, value in {**PAIR, **(changes or {})}.items() if key not in drop}
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_example_of_a_science_question_is_byte_exact(scienceqa):
    assert scienceqa.example(ROW, 0) == {
        "id": "17",
        "instruction": INSTRUCTION,
        "input": "",
        "output": "Answer: The answer is A.",
        "answer": "A",
        "num_choices": 3,
        "subject": "natural science",
    }


@pytest.mark.parametrize("hint", ["", "   \n", None])
def test_empty_hint_becomes_not_available(scienceqa, hint):
    instruction = scienceqa.example({**ROW, "hint": hint}, 0)["instruction"]
    assert instruction.startswith("Context: N/A\nQuestion: Which plant grows?\n")


def test_line_breaks_and_braces_stay(scienceqa):
    row = {**ROW, "hint": "a\nb {question}", "question": "{x}\n {0}?", "choices": ["{", "}"]}
    assert scienceqa.example(row, 0)["instruction"] == (
        "Context: a\nb {question}\nQuestion: {x}\n {0}?\nOptions: (A) { (B) }\n"
    )


def test_answer_may_be_a_letter_already(scienceqa):
    assert scienceqa.example({**ROW, "answer": "C"}, 0)["answer"] == "C"


def test_letters_go_up_to_z(scienceqa):
    row = {**ROW, "choices": [f"choice {i}" for i in range(26)], "answer": 25}
    example = scienceqa.example(row, 0)
    assert example["answer"] == scienceqa.extract_answer("The answer is Z.") == "Z"
    assert "(Y) choice 24 (Z) choice 25\n" in example["instruction"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 3}, r"row `17`: `answer` must be an index from 0 to 2 .* got 3\."),
        ({"answer": True}, r"row `17`: `answer`.* got True\."),
        ({"answer": "D"}, r"row `17`: `answer`.* got 'D'\."),
        ({"answer": "a"}, r"row `17`: `answer`.* got 'a'\."),
        ({"choices": ["one"]}, r"row `17`: `choices` must be a list of 2 to 26 texts"),
        ({"choices": ["x"] * 27}, r"row `17`: `choices`"),
        ({"choices": ["a", 2]}, r"row `17`: `choices`"),
        ({"question": None}, r"row `17`: `question` must be text: got None"),
        ({"hint": 4}, r"row `17`: `hint` must be text: got 4"),
        ({"id": ""}, r"row 0: `id` must be text or an integer: got ''"),
    ],
)
def test_bad_value_names_the_row(scienceqa, changes, message):
    with pytest.raises(MolaError, match=message):
        scienceqa.example({**ROW, **changes}, 0)


def test_missing_column_is_named_with_the_columns_there_are(scienceqa):
    row = {name: value for name, value in ROW.items() if name != "hint"}
    with pytest.raises(MolaError, match=r"no column `hint`, .* its columns are id, image, question"):
        scienceqa.example(row, 0)


def test_id_is_made_from_split_and_position(scienceqa):
    row = {**ROW, "id": None}
    assert scienceqa.example(row, 4, "train")["id"] == "train-4"
    assert scienceqa.example(row, 4)["id"] == "row-4"


def test_rows_with_an_image_are_filtered(scienceqa):
    assert scienceqa.keeps(ROW)
    assert scienceqa.keeps({"question": "no such column"})
    assert not scienceqa.keeps({**ROW, "image": {"bytes": b"x"}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: The answer is A.", "A"),
        ("The answer is A", "A"),
        ("The answer is B</s>", "B"),
        ("The answer is A. The answer is B.", "A"),
        ("The answer is Apple", None),
        ("The answer is Apple. The answer is B.", "B"),
        ("The answer is A1", None),
        ("the answer is A.", "A"),
        ("The correct answer is (B) because it is.", "B"),
        ("The answer is: C", "C"),
        ("Answer: (B) the rock", "B"),
        ("Answer (A) or (B)?", "A"),
        ("The answer is a.", None),
        ("The answer is D.", None),
        ("The answer is Z. The answer is A.", None),
        ("A", None),
        ("", None),
    ],
)
def test_extract_answer_with_three_choices(scienceqa, text, expected):
    assert scienceqa.extract_answer(text, 3) == expected


@given(
    question=st.text(),
    hint=st.none() | st.text(),
    choices=st.lists(st.text(), min_size=2, max_size=26),
    data=st.data(),
)
def test_output_gives_back_the_answer(question, hint, choices, data):
    task = load_task("scienceqa")
    answer = data.draw(st.integers(0, len(choices) - 1))
    example = task.example({"question": question, "hint": hint, "choices": choices, "answer": answer}, 0)
    letter = string.ascii_uppercase[answer]
    assert example["answer"] == letter == task.extract_answer(example["output"], len(choices))
    assert f"({letter}) {choices[answer]}" in example["instruction"]
    assert f"\nQuestion: {question}\n" in example["instruction"]


def test_task_of_the_user_with_words(tmp_path):
    task = load_task(write_task(tmp_path))
    example = task.example({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 3}, 3, "dev")
    assert example == {
        "id": "dev-3",
        "instruction": "Same meaning?\n1: a\n2: b\n",
        "input": "",
        "output": "The answer is Yes.",
        "answer": "Yes",
        "num_choices": 2,
    }
    assert task.example({"sentence1": "a", "sentence2": "b", "label": "0"}, 0)["answer"] == "No"
    assert task.extract_answer("So The answer is No", example["num_choices"]) == "No"
    assert task.extract_answer("The answer is Nothing.") is None
    assert task.extract_answer("The answer is Maybe.") is None
    with pytest.raises(MolaError, match=r"row `row-0`: `label` must be one of 0, 1: got -1"):
        task.example({"sentence1": "a", "sentence2": "b", "label": -1}, 0)


def test_no_and_yes_are_words_in_a_task_file(tmp_path):
    """`no` and `yes` are words, and texts that say true or false are labels like the truth values."""
    text = Path(write_task(tmp_path)).read_text(encoding="utf-8")
    words = "{yes: 'Yes', no: 'No', true: 'Right', false: 'Wrong'}"
    rule = f"answer: {{column: label, words: {words}}}\nfilters: {{sentence1: no}}\n"
    head, _, rest = text.partition("answer:")
    (tmp_path / "words.yaml").write_text(head + rule + rest[rest.index("\nanswer_pattern") :], encoding="utf-8")
    task = load_task(str(tmp_path / "words.yaml"))
    assert task.keeps({"sentence1": "no", "sentence2": "b", "label": "no"})
    labels = {"yes": "Yes", "no": "No", "true": "Right", "false": "Wrong", True: "Right", False: "Wrong"}
    for label, word in labels.items():
        assert task.example({"sentence1": "no", "sentence2": "b", "label": label}, 0)["answer"] == word


def test_task_of_free_text(tmp_path):
    changes = {
        "columns": ["text"],
        "instruction": None,
        "output": "{text}",
        "fields": {"text": {"column": "text"}},
    }
    task = load_task(write_task(tmp_path, changes, drop=("answer", "answer_pattern", "metric")))
    example = task.example({"text": " a story "}, 0)
    assert (example["instruction"], example["output"], example["answer"]) == (None, "a story", None)
    with pytest.raises(MolaError, match="`text` must not be empty"):
        task.example({"text": " "}, 0)
    with pytest.raises(MolaError, match="`pair` is free text"):
        task.extract_answer("The answer is A.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colums": []}, "unknown key `colums`"),
        ({"version": "1"}, "`version` must be an integer: got '1'"),
        ({"name": 5}, "`name` must be text"),
        ({"input": None}, "`input` must be text"),
        ({"template": "alpacca"}, "`template` must be one of alpaca"),
        ({"columns": "label"}, "`columns` must be a list"),
        ({"columns": ["sentence1", "sentence2"]}, "`columns` must list every column in use: `label`"),
        ({"groups": [1]}, "`groups` must be a list"),
        ({"groups": ["answer"]}, "`groups` must not hold .* got `answer`"),
        ({"filters": ["image"]}, "`filters` must be a mapping"),
        ({"fields": {"context": {"column": "label", "defualt": "x"}}}, "`fields.context` must be"),
        ({"fields": {"context": {"column": "hint"}}}, "`columns` must list every column in use: `hint`"),
        ({"fields": {"context": {"column": "label", "strip": "start"}}}, "`strip: both` or `strip: end`"),
        ({"strata": "label"}, "`strata` must be a mapping"),
        ({"strata": {"column": 1}}, "`strata` must be {column: NAME}"),
        ({"strata": {"column": "label", "until": ""}}, "`strata` must be {column: NAME}"),
        ({"strata": {"column": "label", "before": "."}}, "`strata` must be {column: NAME}"),
        ({"answer": "label"}, "`answer` must be a mapping"),
        ({"answer": {"column": "label"}}, "`answer` must be {column"),
        ({"answer": {"column": "label", "words": {0: False, 1: True}}}, "quoted text"),
        ({"answer": {"column": "label", "words": {0: "No"}}}, "at least two words"),
        ({"answer": {"column": "label", "words": {0: "a", 1: "b"}, "choices": "c"}}, "`answer` must be"),
        ({"answer_pattern": "("}, "`answer_pattern` is not a regular expression"),
        ({"answer_pattern": "(A)(B)"}, "exactly one group: got 2"),
        ({"answer_pattern": None}, "depend on each other"),
        ({"answer": None}, "depend on each other"),
        ({"fields": {"answer": {"column": "sentence1"}}}, "`answer` is set by the `answer` rule"),
        ({"columns": ["sentence1", "sentence2", "label", "answer"]}, "`answer` is set by the `answer` rule"),
        ({"metric": "bleu"}, "`metric` must be 'accuracy'"),
        ({"more_metrics": "f1"}, "`more_metrics` must be a list of texts: got 'f1'"),
        ({"more_metrics": ["bleu"]}, r"`more_metrics` must hold names out of f1, matthews.*got \['bleu'\]"),
        ({"more_metrics": ["f1", "f1"]}, "each once"),
        ({"more_metrics": ["f1"], "answer": {"column": "label", "words": {0: "Yes", 2: "No"}}}, "labels 0 and 1"),
        ({"more_metrics": ["f1"], "answer": {"column": "label", "words": {0: "Yes", 1: "Yes"}}}, "two different"),
        ({"more_metrics": ["f1"], "answer": {"column": "label", "choices": "sentence1"}}, "labels 0 and 1"),
        ({"instruction": "{sentence3}"}, "`instruction` uses {sentence3}"),
        ({"instruction": "{options}"}, "`instruction` uses {options}"),
        ({"output": "{answer.__class__}"}, "plain fields"),
        ({"output": "{answer"}, "not a format string"),
    ],
)
def test_malformed_key_is_named(tmp_path, changes, message):
    with pytest.raises(MolaError, match=message):
        load_task(write_task(tmp_path, changes))


def test_options_may_be_a_column_of_a_task_with_words(tmp_path):
    changes = {"columns": ["sentence1", "options", "label"], "instruction": "{sentence1} {options}"}
    task = load_task(write_task(tmp_path, changes))
    row = {"sentence1": "Is it?", "options": "Yes, if agreed; No, if not", "label": 1}
    assert task.example(row, 0)["instruction"] == "Is it? Yes, if agreed; No, if not"


@pytest.mark.parametrize("key", ["name", "version", "template", "columns", "instruction", "output"])
def test_missing_key_is_named(tmp_path, key):
    with pytest.raises(MolaError, match=f"the key `{key}` is missing"):
        load_task(write_task(tmp_path, drop=(key,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n", "mapping"),
        ("", "mapping"),
        ("name: a\ninstruction: one\ninstruction: two\n", "'instruction' occurs twice"),
    ],
)
def test_file_that_is_not_a_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "task.yml"
    path.write_text(text)
    with pytest.raises(MolaError, match=message) as caught:
        load_task(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["sciencqa", "", "missing.yaml", "scienceqa.yaml"])
def test_unknown_task_lists_the_names(name):
    with pytest.raises(MolaError, match=f"scienceqa.*got {name!r}"):
        load_task(name)


QUESTION = {"question": "Where do boats sleep?", "choices": ["harbour", "attic", "oven", "cloud", "well"]}
PAIR_ROW = {"sentence1": "The kettle sang at noon. ", "sentence2": " At noon the kettle was singing."}
FIVE = "Options: (A) harbour (B) attic (C) oven (D) cloud (E) well\n"
FOUR = FIVE.replace(" (E) well", "")
PAIR_TEXT = "Sentence 1: The kettle sang at noon.\nSentence 2: At noon the kettle was singing.\nQuestion: "
# Task, row, its instruction, its answer, its number of choices.
PACKAGED = [
    ("scienceqa", ROW, INSTRUCTION, "A", 3),
    ("sample", ROW, INSTRUCTION, "A", 3),
    (
        "commonsenseqa",
        {**QUESTION, "answer": 4, "question_concept": "boat"},
        f"Question: Where do boats sleep?\n{FIVE}",
        "E",
        5,
    ),
    (
        "openbookqa",
        {**QUESTION, "choices": QUESTION["choices"][:4], "answer": 2, "fact1": "boats rest in ports"},
        f"Question: Where do boats sleep?\n{FOUR}",
        "C",
        4,
    ),
    (
        "mrpc",
        {**PAIR_ROW, "label": 1},
        f"{PAIR_TEXT}Do both sentences mean the same?\nOptions: Yes or No\n",
        "Yes",
        2,
    ),
    (
        "rte",
        {**PAIR_ROW, "label": 0},
        f"{PAIR_TEXT}Does sentence 2 follow from sentence 1?\nOptions: Yes or No\n",
        "Yes",
        2,
    ),
    (
        "cola",
        {"sentence": "Kettle the sang noon at. ", "label": 0},
        "Sentence: Kettle the sang noon at.\nQuestion: Is this sentence acceptable English?\nOptions: Yes or No\n",
        "No",
        2,
    ),
]
WORD_TASKS = {"mrpc": {0: "No", 1: "Yes"}, "cola": {0: "No", 1: "Yes"}, "rte": {0: "Yes", 1: "No"}}


@pytest.mark.parametrize(("name", "row", "instruction", "answer", "num_choices"), PACKAGED)
def test_packaged_task_gives_back_its_own_answer(name, row, instruction, answer, num_choices):
    task = load_task(name)
    example = task.example(row, 0, "train")
    assert example["instruction"] == instruction
    assert (example["input"], example["output"]) == ("", f"Answer: The answer is {answer}.")
    assert (example["answer"], example["num_choices"]) == (answer, num_choices)
    assert task.extract_answer(example["output"], num_choices) == answer


def test_every_packaged_task_has_an_example_here():
    free_text = [name for name in task_names() if load_task(name).answer is None]
    assert free_text == ["openorca"], "see below"
    assert sorted([case[0] for case in PACKAGED] + free_text) == task_names()
    assert all(load_task(name).name == name and load_task(name).description for name in task_names())


@given(question=st.text(), response=st.text())
@example(question=" a \n", response="  b\n c \n")
@example(question="{x}", response="\n")
def test_openorca_is_question_and_response_in_one_piece(question, response):
    task = load_task("openorca")
    row = {"id": "flan.1", "system_prompt": "S", "question": question, "response": response}
    if not question.strip() or not response.strip():
        assert task.blank_column(row) in ("question", "response")
        with pytest.raises(MolaError, match="must not be empty"):
            task.example(row, 0)
        return
    assert task.blank_column(row) is None
    assert task.example(row, 0) == {
        "id": "flan.1",
        "instruction": None,
        "input": "",
        "output": (question.strip() + "\n" + response).strip(),
        "answer": None,
        "num_choices": None,
    }


@pytest.mark.parametrize(
    ("until", "value", "group"),
    [
        (".", "flan.1.2", "flan"),
        (".", "nodot", "nodot"),
        (".", ".5", ""),
        (None, "a.b", "a.b"),
        (None, 7, "7"),
        ("--", "a-b--c", "a-b"),
    ],
)
def test_group_of_a_row(tmp_path, until, value, group):
    rule = {"column": "source"} | ({"until": until} if until else {})
    task = load_task(write_task(tmp_path, {"strata": rule}))
    assert task.strata.resolve({"source": value}, "r") == group


@pytest.mark.parametrize("value", [None, "", True, 1.5, ["a"]])
def test_row_without_a_group_is_named(value):
    with pytest.raises(MolaError, match=f"row `r`: `id` must be text or an integer.* got {re.escape(repr(value))}"):
        load_task("openorca").strata.resolve({"id": value}, "r")


def test_field_with_strip_end_keeps_leading_blanks(tmp_path):
    fields = {
        "first": {"column": "sentence1", "strip": "end"},
        "second": {"column": "sentence2", "strip": "both", "default": "nothing"},
    }
    task = load_task(write_task(tmp_path, {"fields": fields, "instruction": "{first}|{second}"}))
    row = {"sentence1": "  a ", "sentence2": "  b ", "label": 0}
    assert task.example(row, 0)["instruction"] == "  a|b"
    assert task.example({**row, "sentence2": " "}, 0)["instruction"] == "  a|nothing"
    assert task.blank_column({**row, "sentence2": " "}) is None
    assert task.blank_column({**row, "sentence1": " \n"}) == "sentence1"


@pytest.mark.parametrize(("name", "words"), WORD_TASKS.items())
def test_label_becomes_its_word_and_other_labels_are_refused(name, words):
    task = load_task(name)
    row = next(case[1] for case in PACKAGED if case[0] == name)
    assert {label: task.example({**row, "label": label}, 0)["answer"] for label in (0, 1)} == words
    for label in (-1, 2, True, None, "Yes"):  # -1 is how test splits without labels come
        with pytest.raises(MolaError, match=rf"row `row-0`: `label` must be one of 0, 1: got {label!r}"):
            task.example({**row, "label": label}, 0)


@pytest.mark.parametrize("name", WORD_TASKS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: The answer is No.", "No"),
        ("The correct answer is (Yes) because", "Yes"),
        ("Answer: yes", "Yes"),
        ("ANSWER: NO", "No"),
        ("the answer is: no</s>", "No"),
        ("Answer: Yes. Answer: No.", "Yes"),
        ("The answer is not clear", None),
        ("The answer is Yesterday", None),
        ("I answered yes", None),
        ("Yes", None),
        ("", None),
    ],
)
def test_word_is_found_in_other_phrasings(name, text, expected):
    assert load_task(name).extract_answer(text, 2) == expected


def test_words_that_differ_in_case_only_stay_apart(tmp_path):
    changes = {
        "answer": {"column": "label", "words": {0: "us", 1: "US", 2: "Them"}},
        "answer_pattern": r"The answer is (\w+)",
    }
    task = load_task(write_task(tmp_path, changes))
    found = [task.extract_answer(f"The answer is {word}.") for word in ("us", "US", "Us", "THEM")]
    assert found == ["us", "US", None, "Them"]


def test_metrics_of_the_packaged_tasks():
    found = {name: load_task(name).more_metrics for name in task_names()}
    assert {name: metrics for name, metrics in found.items() if metrics} == {"cola": ("matthews",), "mrpc": ("f1",)}
    assert load_task("mrpc").binary_labels == ("No", "Yes")
    assert load_task("scienceqa").binary_labels is None


def test_labels_that_become_equal_are_refused(tmp_path):
    layout = "name: own\nversion: 1\ntemplate: meta\ncolumns: [label]\ninstruction: x\noutput: '{answer}'\n"
    path = tmp_path / "own.yaml"
    rule = "answer: {column: label, words: {true: 'Yes', 'True': 'No'}}\nanswer_pattern: '(Yes|No)'\nmetric: accuracy\n"
    path.write_text(layout + rule, encoding="utf-8")
    with pytest.raises(MolaError, match="`words` must have different labels: got True, 'True'"):
        load_task(str(path))
