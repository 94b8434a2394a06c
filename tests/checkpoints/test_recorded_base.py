"""The base model that an adapter records: when it is used, when it cannot be, and whether a given one is the same."""

import json

import pytest

from mola.checkpoints.recorded_base import base_model_of, is_recorded_base
from mola.errors import MolaError


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """Writes an adapter's settings into a new folder; the working folder holds the folder `models/base`."""
    (tmp_path / "models/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def write(name, **settings):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("recorded", ["models/base", "./models/base", "owner/model", "gpt2"])
def test_the_recorded_base_is_used_unless_one_is_given(adapter, recorded):
    folder = adapter("run", base_model_name_or_path=recorded, revision="main")
    assert base_model_of(None, [folder]) == recorded
    assert base_model_of("given", [folder]) == base_model_of("given", ["missing"]) == "given"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "'.*run' does not record which model it was trained on"),
        ({"base_model_name_or_path": ""}, "'.*run' does not record which model"),
        ({"base_model_name_or_path": "../models/gone"}, "was trained on '../models/gone', and there is no such folder"),
        ({"base_model_name_or_path": "/models/a/b"}, "was trained on '/models/a/b', and there is no such folder here"),
        (
            {"base_model_name_or_path": "owner/model", "revision": "v2"},
            "revision 'v2' of owner/model. Run `hf download owner/model --revision v2 --local-dir DIR`",
        ),
    ],
)
def test_a_base_that_is_not_known_must_be_given(adapter, settings, message):
    with pytest.raises(MolaError, match=f"^`base_model` must be given: .*{message}"):
        base_model_of(None, [adapter("run", **settings)])


def test_without_an_adapter_a_base_must_be_given(adapter):
    with pytest.raises(MolaError, match="`base_model` must name a model: pass --base_model"):
        base_model_of(None, [])
    with pytest.raises(MolaError, match="'missing', no such folder"):
        base_model_of(None, ["missing"])


def test_adapters_must_record_the_same_base(adapter, tmp_path):
    one = adapter("one", base_model_name_or_path="models/base")
    two = adapter("two", base_model_name_or_path=str(tmp_path / "models/base"))
    three = adapter("three", base_model_name_or_path="owner/model")
    assert base_model_of(None, [one, two]) == "models/base"
    with pytest.raises(MolaError, match="must be given, since the adapters .* on 'models/base', .* on 'owner/model'"):
        base_model_of(None, [one, three])


def test_folders_are_the_same_by_path_if_both_exist_else_by_name(adapter, tmp_path):
    (tmp_path / "link").symlink_to("models/base")
    (tmp_path / "other/base").mkdir(parents=True)
    same = [("models/base", "link"), ("/moved/base", "models/base"), ("owner/base", "models/base"), (None, "any")]
    same.append(("owner/base", "/cache/models--owner--base/snapshots/0123"))
    different = [("models/base", "other/base"), ("owner/base", "owner/base-2"), ("/moved/base", "link")]
    assert [pair for pair in same if not is_recorded_base(pair[1], pair[0])] == []
    assert [pair for pair in different if is_recorded_base(pair[1], pair[0])] == []
