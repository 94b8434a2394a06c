import shutil

import pytest

from mola.errors import MolaError
from mola.models.base_model import check_base_model, load_config


def test_base_model_folder_without_config_is_refused(tmp_path):
    with pytest.raises(MolaError, match=r"no config\.json"):
        check_base_model(tmp_path)


def test_adapter_given_as_base_model_is_named_as_such(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MolaError, match="pass it as `adapter`"):
        check_base_model(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "../missing", "a/b/c", "~/model", " "])
def test_missing_base_model_path_is_refused(name):
    with pytest.raises(MolaError, match="`base_model`"):
        check_base_model(name)


@pytest.mark.parametrize("name", ["gpt2", "NousResearch/Llama-2-7b-hf", "owner/name_1.5-b"])
def test_hub_ids_pass(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_base_model(name)


def test_file_as_base_model_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(MolaError, match="is a file"):
        check_base_model(file)


def test_config_loads_without_weights(tiny_model_dir, tmp_path):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    assert load_config(tmp_path).num_hidden_layers == 4


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nosuch"}'])
def test_broken_configuration_is_one_clear_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MolaError, match="no readable configuration"):
        load_config(tmp_path)
