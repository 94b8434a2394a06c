import copy

import pytest

from mola.models.tokenizer import load_tokenizer

from .parts import LORAS, save_lora, with_skills


@pytest.fixture(scope="package")
def folders(loaded_tiny_model, tmp_path_factory):
    """Name -> folder of each LoRA."""
    folder = tmp_path_factory.mktemp("skills")
    return {
        name: save_lora(copy.deepcopy(loaded_tiny_model), folder / name, seed, **settings)
        for seed, (name, settings) in enumerate(LORAS.items(), 1)
    }


@pytest.fixture(scope="package")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="package")
def skilled_model(loaded_tiny_model, tokenizer, folders):
    """The tiny model with all skills; tests leave it as it is."""
    return with_skills(copy.deepcopy(loaded_tiny_model), tokenizer, folders)


@pytest.fixture(scope="package")
def lora_models(loaded_tiny_model, folders):
    """Name -> the model with this LoRA in PEFT, without mola."""
    from peft import PeftModel

    models = {name: PeftModel.from_pretrained(copy.deepcopy(loaded_tiny_model), folders[name]) for name in folders}
    return {**{name: model.eval() for name, model in models.items()}, None: loaded_tiny_model}
