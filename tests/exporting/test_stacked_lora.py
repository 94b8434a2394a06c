"""`mola convert` and an adapter of stacked experts: LoRA has them exactly, the research code's format not."""

import shutil

import pytest
import torch
from peft import get_peft_model

from mola import MolaConfig, MolaError
from mola.exporting.convert import ConvertOptions, convert
from mola.exporting.merge import MergeOptions, merge
from tests.exporting.conftest import base as load_base
from tests.exporting.conftest import load, logits
from tests.tuner.test_stacked import BOTH, KINDS, LIKE_OURS, base


# PEFT looks for what they name among linears only, and uses them all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@LIKE_OURS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], []], ids=["linears", "no-linears"])
def test_export_is_exact(kind, targets, tiny_tokenizer_dir, tmp_path):
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "base")
    base(kind).save_pretrained(tmp_path / "base")
    settings = {
        "num_experts": 1,
        "top_k": 1,
        "r": [6, 2],
        "alpha_pattern": {"down_proj": 5},
        "init_lora_weights": False,
    }
    config = MolaConfig(target_modules=targets, target_parameters=BOTH, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(1)
    get_peft_model(base(kind), config).save_pretrained(tmp_path / "adapter")
    options = {"target_format": "lora", "base_model": str(tmp_path / "base"), "rank": 4}
    convert(ConvertOptions([str(tmp_path / "adapter")], str(tmp_path / "lora"), **options))
    ours, lora = (logits(load(tmp_path / "base", tmp_path / name)) for name in ("adapter", "lora"))
    # Both models sum the experts' float32 products in a different order, and the rounding differs by CPU.
    torch.testing.assert_close(lora, ours, rtol=0, atol=2e-5)
    assert (ours - logits(base(kind))).abs().max() > 0.1
    merge(MergeOptions(str(tmp_path / "lora"), str(tmp_path / "base"), str(tmp_path / "merged"), dtype="float32"))
    torch.testing.assert_close(logits(load_base(tmp_path / "merged")), ours, rtol=0, atol=1e-4)


def test_the_research_codes_format_has_no_stacked_experts(tmp_path):
    config = MolaConfig(num_experts=2, target_modules=["q_proj"], target_parameters=BOTH, task_type="CAUSAL_LM")
    get_peft_model(base(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MolaError, match="`target_parameters` cannot be expressed in the research code's format"):
        convert(ConvertOptions([str(tmp_path / "adapter")], str(tmp_path / "out"), target_format="published"))
