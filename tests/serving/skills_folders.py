"""Skills folders on the tiny model: random LoRAs, and statistics of prompts that a byte-level model tells apart."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from mola.checkpoints.skills_folder import SkillEntry, SkillsFolder, add_entry, copy_lora, write_skills
from mola.files.digests import WEIGHTS_FILE, file_sha256
from mola.models.base_model import weights_identity
from mola.models.tokenizer import load_tokenizer
from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.general_text import general_texts
from mola.tuner.skills.reading import read_prompts
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics

FOLDER = "skills"
LAYER = 2


def prompt_of(kind, number):
    """A prompt of a kind: two binary numbers in the characters of the kind."""
    return f"{number * 97:b} {number * 31:b}".translate(str.maketrans("01", CHARACTERS[kind]))


CHARACTERS = {"numbers": "37", "shouts": "HA", "marks": "(;"}
PROMPTS = {kind: [prompt_of(kind, number) for number in range(20, 40)] for kind in CHARACTERS}
NO_KIND = "The cat sat on a mat."
KINDS = [("numbers", prompt_of("numbers", 45)), ("shouts", prompt_of("shouts", 45)), (None, NO_KIND)]
MARKS = prompt_of("marks", 45)
LONG = prompt_of("numbers", 10**9)


def chats():
    """Pairs of a skill and a chat whose last turn it answers; each chat continues the one before."""
    found, messages = [], []
    for skill, content in KINDS:
        messages = [*messages, {"role": "user", "content": content}]
        found.append((skill, messages))
        messages = [*messages, {"role": "assistant", "content": "So."}]
    return found


def save_lora(base, folder, seed):
    """A LoRA of the upper two layers, far enough from zero that greedy answers differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=2,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=[2, 3],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def make_skills_folder(base, folder, kinds, loras, seed=0, layer=LAYER):
    """A skills folder with a skill for each of `kinds`, name -> prompts; the folder `loras` gets their LoRAs."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(base).eval(), load_tokenizer(base)
    finder = ContentFinder(tokenizer)

    def measure(cls, texts):
        batches = [read_prompts(model, layer, finder, [tokenizer(text)["input_ids"]]) for text in texts]
        return {name: tensor.contiguous() for name, tensor in cls.measure(batches).tensors().items()}

    general = measure(GeneralStatistics, general_texts()[:40])
    skills = SkillsFolder(folder, str(base), weights_identity(base), layer, 0.2, None, {}, general, {})
    adapters = {name: save_lora(base, loras / name, seed + number) for number, name in enumerate(kinds)}
    for name, texts in kinds.items():
        entry = SkillEntry(file_sha256(adapters[name] / WEIGHTS_FILE), "", 2, len(texts))
        skills = add_entry(skills, name, entry, measure(SkillStatistics, texts))
    write_skills(skills, adapters, copy_lora)
    return folder
