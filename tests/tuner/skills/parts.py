"""Parts of a tiny model with skills: LoRAs with random values, and prompts that each of them knows."""

import torch
from peft import LoraConfig, get_peft_model

from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.reading import read_prompts
from mola.tuner.skills.runtime import SkillsRuntime
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics

LAYER, NUM_LAYERS = 2, 4
UPPER = [2, 3]
# What differs between LoRAs: targets, ranks, scales.
LORAS = {
    "digits": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    "signs": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "words": {
        "r": 3,
        "lora_alpha": 2,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"layers.3.self_attn.q_proj": 7},
        "lora_dropout": 0.5,
        "target_modules": ["q_proj", "o_proj", "up_proj"],
    },
}
PROMPTS = {
    "digits": ["0123 4567", "99 12 34 5", "7 8 9 10 11", "3141592653"],
    "signs": ["+-*/ ?!", "<<>> ==", "();;{}[]", "##$$%%&&"],
    "words": ["the old house", "a green tree", "some warm rain", "his red coat"],
}
GENERAL = ["Mixed 12 words, and signs!", "AB 9 cd ??", "Hello (you) 77", "x = y + 3;", "No. 5, please", "[a] 1: b"]


def save_lora(model, folder, seed=1, layers=UPPER, **settings):
    """A LoRA of PEFT with random values, so that it matters. `model` is changed."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, layers_to_transform=layers, **settings)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def encode(tokenizer, texts, padding_side="left"):
    """Ids and mask of texts."""
    tokenizer.padding_side = padding_side
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def features(model, tokenizer, texts, layer=LAYER):
    """One batch per text."""
    finder = ContentFinder(tokenizer)
    for text in texts:
        yield read_prompts(model, layer, finder, [tokenizer(text)["input_ids"]])


def with_skills(model, tokenizer, folders, layer=LAYER, **options):
    """Put skills into a base model; their statistics are those of `PROMPTS`."""
    statistics = {
        name: SkillStatistics.measure(features(model, tokenizer, PROMPTS[name[:6].rstrip("_")], layer))
        for name in folders
    }
    general = GeneralStatistics.measure(features(model, tokenizer, GENERAL, layer))
    runtime = SkillsRuntime(model, layer, ContentFinder(tokenizer), general, **{"threshold": 0.0, **options})
    for name, folder in folders.items():
        runtime.add(name, folder, statistics[name])
    return model
