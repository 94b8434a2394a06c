"""Skills on a base whose linears are packed: the LoRA is added to what the packed linear gives."""

import pytest
import torch
from peft import PeftModel

from mola.models.tokenizer import load_tokenizer

from ..tuner.skills.parts import LORAS, PROMPTS, encode, save_lora, with_skills
from .models import quantised

pytestmark = pytest.mark.quant


def test_prompts_have_the_logits_of_their_skills_own_lora(bitsandbytes, blocks_dir, tmp_path):
    tokenizer = load_tokenizer(blocks_dir)
    folders = {
        name: save_lora(quantised(blocks_dir, "nf4"), tmp_path / name, seed, **LORAS[name])
        for seed, name in enumerate(("digits", "words"))
    }
    model = with_skills(quantised(blocks_dir, "nf4"), tokenizer, folders)
    lora = PeftModel.from_pretrained(quantised(blocks_dir, "nf4"), folders["words"]).eval()
    inputs = encode(tokenizer, PROMPTS["words"])
    with torch.no_grad(), model.skills.use("words"):
        torch.testing.assert_close(model(**inputs).logits, lora(**inputs).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.skills.use(["words", None, "digits", "words"]):
        mixed = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(mixed[[0, 3]], lora(**inputs).logits[[0, 3]], rtol=1e-4, atol=1e-4)
