"""Changed and damaged input of mola's own formats: an error, or the right result, but never a wrong one."""

import copy
import json
import re

import hypothesis
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mola import MolaConfig, MolaError
from mola.architecture.notation import resolve_per_layer
from mola.checkpoints.adapter_folder import read_tensors
from mola.data.tasks import load_task
from mola.data.tasks.loading import resources
from mola.files.digests import weights_sha256
from mola.models.plan import PlanOptions
from mola.options.parsing import convert, parse

fuzz = hypothesis.settings.get_profile("fuzz")
TASK, WORDS_TASK = (
    yaml.safe_load(resources.files("mola.data.tasks").joinpath(f"{name}.yaml").read_text("utf-8"))
    for name in ("scienceqa", "mrpc")
)
ROW = {"question": "Why?", "choices": ["a", "b"], "answer": 1, "hint": "", "subject": "x", "id": "7"}
ROW |= {"sentence1": "One.", "sentence2": "Two.", "label": 0}
SCALARS = st.sampled_from([None, True, False, 0, -1, 2, 10**30, 0.5, "", " ", "{", "{0}", "{a.b}", "(", "null", "é"])
SCALARS |= st.integers() | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=8), SCALARS, max_size=3)


def _places(document, path=()):
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*path, key))


@st.composite
def changed(draw, document):
    """`document` with up to three changes: another value, or a key that is missing, renamed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        *above, key = draw(st.sampled_from(list(_places(document))))
        owner = document
        for step in above:
            owner = owner[step]
        kind = draw(st.sampled_from(["value", "value", "remove", "rename"]))
        if kind == "value":
            owner[key] = draw(VALUES)
        elif kind == "remove" or isinstance(owner, list):
            del owner[key]
        else:
            owner[draw(st.text(max_size=8))] = owner.pop(key)
        if not document:
            return document
    return document


@fuzz
@given(changed(TASK) | changed(WORDS_TASK), changed(ROW))
def test_a_changed_task_or_row_is_refused_or_makes_a_whole_example(tmp_path_factory, document, row):
    path = tmp_path_factory.getbasetemp() / "task.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    try:
        task = load_task(path)
        example = task.example(row, 0)
    except MolaError:
        return
    texts = [example[name] for name in ("id", "input", "output")]
    assert all(isinstance(text, str) for text in texts)
    assert example["instruction"] is None or isinstance(example["instruction"], str)
    assert {*document} == {name for name in document if hasattr(task, name)}
    if task.answer is not None:
        answers = set((task.answer.words or {}).values()) or {*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
        assert example["answer"] in answers


NOTATIONS = VALUES | st.sampled_from(["2468", "1,2,3,4", "10,", "a,,b", "2", "1e9", "٤", "²"])


@pytest.mark.parametrize("name", ["num_experts", "r", "top_k"])
@fuzz
@given(value=NOTATIONS, layers=st.integers(1, 40))
def test_a_notation_is_refused_or_gives_every_layer_its_number(name, value, layers):
    try:
        numbers = resolve_per_layer(value, layers, name)
    except MolaError:
        return
    assert len(numbers) == layers
    assert all(type(number) is int and number >= 1 for number in numbers)
    if isinstance(value, list) and len(value) == layers:
        assert numbers == value
    elif isinstance(value, str) and re.fullmatch("[0-9]+(,[0-9]+)+", value):
        assert numbers == [int(part) for part in value.split(",")]


PLAN = {"base_model": "m", "num_experts": "1,2", "r": "8", "target_modules": "q_proj", "json": True, "dtype": "float32"}
WORDS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12).filter(lambda text: text[0] != "-")


@fuzz
@given(st.dictionaries(st.sampled_from(sorted(PLAN)), WORDS | st.integers(0, 10**6) | st.floats(0, 1), min_size=1))
def test_a_recipe_means_the_same_as_its_flags(tmp_path_factory, values):
    values = {"base_model": "m", **values}
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    results = []
    for arguments in (["--config", str(path)], [f"--{name}={value}" for name, value in values.items()]):
        try:
            results.append(parse(PlanOptions, arguments, prog="mola plan"))
        except MolaError as error:
            results.append(type(error))
    assert results[0] == results[1]


@fuzz
@given(changed({"r": 4, "num_experts": [1, 2], "top_k": 1, "json": False}))
def test_options_in_a_mapping_are_refused_or_have_the_type_of_the_option(values):
    try:
        options = convert(PlanOptions, values, "recipe")
    except MolaError:
        return
    assert all(isinstance(value, (str, bool, type(None))) for value in options.values())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_file({"mola_A": torch.ones(2, 4, 8), "mola_B": torch.zeros(2, 4, 8)}, folder / "adapter_model.safetensors")
    settings = MolaConfig(r=4, num_experts=2, top_k=1).to_dict() | {"weights_sha256": weights_sha256(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@fuzz
@given(data=st.data())
def test_changed_weights_are_refused(adapter, data):
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    try:
        with pytest.raises(MolaError):
            read_tensors(adapter)
    finally:
        path.write_bytes(content)
    assert read_tensors(adapter)["mola_A"].eq(1).all()
