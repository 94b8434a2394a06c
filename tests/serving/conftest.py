"""A real server on loopback: tiny random model with a chat template, two adapters that give different answers."""

import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mola import MolaConfig
from mola.generation.decoding import generate_text
from mola.models.loading import load_model
from mola.models.tokenizer import load_tokenizer

from .skills_folders import FOLDER, NO_KIND, PROMPTS, make_skills_folder

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
OWN_TEMPLATE = "{{ bos_token }}[{{ messages[-1].content }}]"
NEW_TOKENS = 4


def save_adapter(base, folder, seed, std=0.3):
    """An adapter far enough from zero that greedy answers differ."""
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = MolaConfig(
            num_experts="2222", r=2, top_k=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "mola_B" in name or "mola_router" in name:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def endless_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model again, never choosing its end token: its answers are as long as asked for."""
    folder = tmp_path_factory.mktemp("endless") / "tiny"
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_model_dir(endless_model_dir, tmp_path_factory):
    """The same with a chat template."""
    folder = shutil.copytree(endless_model_dir, tmp_path_factory.mktemp("serve") / "tiny-chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory):
    """Name -> folder of two adapters; one name has a dot, which PEFT would not take."""
    parent = tmp_path_factory.mktemp("adapters")
    folders = {"first": parent / "first", "v2.0": parent / "second"}
    for seed, folder in enumerate(folders.values()):
        save_adapter(tiny_model_dir, folder, seed)
    return folders


@pytest.fixture(scope="session")
def offline(chat_model_dir, adapters):
    """Function (model name, prompt, options) -> what `mola generate` answers."""
    tokenizer = load_tokenizer(chat_model_dir)
    base = load_model(chat_model_dir, dtype="float32", device="cpu")
    models = {"tiny-chat": base}
    for name, folder in adapters.items():
        models[name] = load_model(chat_model_dir, folder, dtype="float32", device="cpu")
    known = {}

    def answer(name, prompt, **options):
        options = {"max_new_tokens": NEW_TOKENS} | options
        key = name, prompt, *sorted(options.items())
        if key not in known:
            known[key] = generate_text(models[name], tokenizer, prompt, **options)
        return known[key]

    return answer


@pytest.fixture(scope="session")
def skills_root(chat_model_dir, tmp_path_factory):
    """A skills folder to serve, one with one more skill, one whose decision reads another layer, and plain LoRAs."""
    root = tmp_path_factory.mktemp("root")
    served = {name: PROMPTS[name] for name in ("numbers", "shouts")}
    make_skills_folder(chat_model_dir, root / FOLDER, served, root / "loras")
    make_skills_folder(chat_model_dir, root / "more", {"marks": PROMPTS["marks"]}, root / "other", seed=7)
    (root / "more" / "marks" / "chat_template.jinja").write_text(OWN_TEMPLATE, encoding="utf-8")
    make_skills_folder(chat_model_dir, root / "deeper", {"deep": PROMPTS["marks"]}, root / "third", layer=3)
    return root


@pytest.fixture(scope="session")
def own_answer(chat_model_dir, skills_root):
    """Function (skill or None, prompt) -> what this skill's LoRA in PEFT, or the base model alone, answers."""
    tokenizer = load_tokenizer(chat_model_dir)
    models = {None: load_model(chat_model_dir, dtype="float32", device="cpu")}
    for name, folder in (("numbers", FOLDER), ("shouts", FOLDER), ("marks", "more")):
        models[name] = load_model(chat_model_dir, skills_root / folder / name, dtype="float32", device="cpu")

    def answer(skill, prompt, max_new_tokens=12):
        return generate_text(models[skill], tokenizer, prompt, max_new_tokens=max_new_tokens)

    assert len({answer(skill, NO_KIND) for skill in models}) == 4
    return answer
