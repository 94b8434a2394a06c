"""Weights and base models that an adapter cannot be used with."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from mola import MolaConfig, MolaError
from mola.files.digests import check_finite
from mola.tuner.injection_checks import check_base_model
from mola.tuner.loading import check_on_load_state_dict

from ..versions import needs
from .models import random_config, tiny_llama

EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, *EIGHT_BITS])
def test_values_that_are_not_finite_are_counted(dtype):
    values = torch.tensor([1.0, float("nan"), 0.0, float("nan")]).to(dtype)
    check_finite({"a": values[::2]}, "the file")
    with pytest.raises(MolaError, match=r"^the file must hold finite numbers: 2 of 4 values of 'a' are not finite"):
        check_finite({"fine": torch.ones(3), "a": values}, "the file")


def test_infinite_values_are_counted_and_integers_are_finite():
    with pytest.raises(MolaError, match="1 of 2 values of 'a'"):
        check_finite({"a": torch.tensor([float("-inf"), 1.0]), "b": torch.ones(3, dtype=torch.bool)}, "the file")


def test_another_kind_of_base_model():
    def check(trained_on, found):
        model = nn.Module()
        model.config = SimpleNamespace(model_type=found)
        check_base_model(MolaConfig(base_model_type=trained_on), model)

    for trained_on, found in (("llama", "llama"), (None, "llama"), ("llama", None), (None, None)):
        check(trained_on, found)
    with pytest.raises(MolaError, match="is of type 'mistral', `base_model_type` in adapter_config.json is 'llama'"):
        check("llama", "mistral")


def test_load_state_dict_checks_tensors_for_older_versions_of_peft():
    """As with PEFT before 0.21, whose files of a model with two adapters hold both."""
    model = get_peft_model(tiny_llama(), random_config())
    inner = model.base_model.model
    check_on_load_state_dict(inner)
    check_on_load_state_dict(inner)
    assert len(inner._load_state_dict_pre_hooks) == 1
    tensors = {key: value.clone() for key, value in model.state_dict().items() if ".mola_" in key}
    key = next(iter(tensors))
    model.load_state_dict({**tensors, key.replace(".default", ".second.default"): torch.zeros(1)}, strict=False)
    with pytest.raises(MolaError, match="1 of .* tensors are missing"):
        model.load_state_dict({name: each for name, each in tensors.items() if name != key}, strict=False)
    with pytest.raises(MolaError, match="1 are unknown"):
        model.load_state_dict({**tensors, key.replace("layers.0", "layers.9"): torch.zeros(1)}, strict=False)
    with pytest.raises(MolaError, match="not finite"):
        model.load_state_dict({**tensors, key: tensors[key] * float("nan")}, strict=False)
    copied = pickle.loads(pickle.dumps(model))
    with pytest.raises(MolaError, match="missing"):
        copied.load_state_dict({name: each for name, each in tensors.items() if name != key}, strict=False)


@needs("peft", "0.21", "PEFT asks nobody before it loads")
def test_values_of_saved_modules_are_checked(tmp_path):
    model = get_peft_model(tiny_llama(), random_config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        next(each for name, each in model.named_parameters() if "modules_to_save.default" in name).fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(MolaError, match="lm_head.*not finite"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
