"""`load_model` of a skills folder."""

import copy

import pytest
import torch
from peft import PeftModel

from mola import load_model
from mola.checkpoints.skills_folder import SkillEntry, SkillsFolder, add_entry, write_skills
from mola.errors import MolaError
from mola.files.digests import file_sha256
from mola.models.base_model import weights_identity
from mola.models.skills import content_finder
from mola.models.tokenizer import load_tokenizer
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics

from ..tuner.skills.parts import GENERAL, LAYER, LORAS, PROMPTS, encode, features, save_lora

MIXED, NAMES = ["0123 4567", "+-*/ ?!", "the old house"], ["digits", "signs", "words"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def skills_dir(loaded_tiny_model, tokenizer, tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("skills")
    adapters = {
        name: save_lora(copy.deepcopy(loaded_tiny_model), path / "loras" / name, seed, **settings)
        for seed, (name, settings) in enumerate(LORAS.items())
    }
    general = GeneralStatistics.measure(features(loaded_tiny_model, tokenizer, GENERAL)).tensors()
    base = str(tiny_model_dir)
    folder = SkillsFolder(path / "skills", base, weights_identity(base), LAYER, -1e6, None, {}, general, {})
    for name, adapter in adapters.items():
        statistics = SkillStatistics.measure(features(loaded_tiny_model, tokenizer, PROMPTS[name])).tensors()
        entry = SkillEntry(file_sha256(adapter / "adapter_model.safetensors"), "", 2, 4)
        folder = add_entry(folder, name, entry, statistics)
    write_skills(folder, adapters, copy_folder)
    return folder.path


def copy_folder(source, target):
    target.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (target / file).write_bytes((source / file).read_bytes())


def load(*args, **options):
    return load_model(*args, dtype="float32", device="cpu", **options)


def test_each_prompt_has_the_logits_of_its_skill(skills_dir, tiny_model_dir, tiny_model, tokenizer):
    model = load(skills_dir)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.skills.names == sorted(NAMES)
    inputs = encode(tokenizer, MIXED)
    with torch.no_grad():
        found = model(**inputs).logits
    assert model.skills.last_names == NAMES
    for row, name in enumerate(NAMES):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        lora = PeftModel.from_pretrained(copy.deepcopy(tiny_model), skills_dir / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(found[row : row + 1], lora(**own).logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(load(tiny_model_dir, skills_dir)(**own).logits, lora(**own).logits)


def test_what_does_not_fit_is_one_line(skills_dir, small_model_dir):
    with pytest.raises(MolaError, match="must have the weights that .* was made on"):
        load(small_model_dir, skills_dir)
    with pytest.raises(MolaError, match="one skills folder alone"):
        load(None, {"skills": skills_dir})
    with pytest.raises(MolaError, match="`max_loaded` must be at least 1: got 0"):
        load(skills_dir, max_loaded=0)


def test_a_lora_that_was_changed_is_found_when_it_is_asked_for(skills_dir, tokenizer, tmp_path):
    copied = tmp_path / "skills"
    copied.mkdir()
    for path in skills_dir.rglob("*"):
        target = copied / path.relative_to(skills_dir)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    weights = copied / "words" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 64
    weights.write_bytes(bytes(content))
    model = load(copied)
    model(**encode(tokenizer, MIXED[:2]))
    with pytest.raises(MolaError, match="is not the file that was added"):
        model(**encode(tokenizer, MIXED[2:]))


def test_content_of_a_chat_of_the_base_model(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    finder = content_finder(tokenizer)
    ids = tokenizer("<user>What is it?<assistant>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(finder.content(ids), skip_special_tokens=True) == "What is it?"
