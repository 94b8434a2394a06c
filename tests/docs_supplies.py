"""What a reader of a page has: models, data and adapters with the names that the pages use, all tiny."""

import json
import re
import shutil
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import mola
from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from tests.docs_blocks import blocks, lines
from tests.skills.conftest import make_lora, write_rows

MODEL = "my-model"
# Bytes tell the prompts of a kind from those of the others.
KINDS = {"measurement": ("1234", "56", "789"), "senses": ("FLOW", "BANK", "MUD"), "sentence": ("wing", "beak", "nest")}
_WRITTEN = re.compile(r"--(?:output|output_dir|into) (\S+)|^output: (\S+)|mola skills add (\S+) .*--base_model", re.M)


def prepare_sample(folder):
    prepare(PrepareOptions("sample", str(folder), train_size=24, validation_size=4, test_size=4))


def _run(path):
    prepare_sample(path.parent / "sample")
    words = ["--task", "sample", "--data", str(path.parent / "sample" / "dataset.hf"), "--disable_tqdm", "true"]
    assert main(["train", "--base_model", MODEL, *words, "--max_steps", "2", "--output", str(path)]) == 0


def _quickstart(path):
    _run(path)
    shutil.move(path.parent / "sample", path / "data")


def _adapter(path):
    torch.manual_seed(0)
    config = mola.MolaConfig(num_experts="2222", r=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config).save_pretrained(path)


def _published(path):
    _adapter(path.parent / "of-mola")
    assert main(["convert", str(path.parent / "of-mola"), "--to", "published", "--output", str(path)]) == 0


def _lora(seed):
    return lambda path: make_lora(MODEL, path, seed)


def _all_layers(seed):
    return lambda path: make_lora(MODEL, path, seed, layers=None)


def _rows(words):
    def write(path):
        write_rows(path, words, number=80)
        if path.suffix == ".jsonl":
            rows = json.loads(path.read_text(encoding="utf-8"))
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    return write


def _chats(path):
    turns = [[("user", f"What is {i} + {i}?"), ("assistant", f"It is {2 * i}.")] for i in range(60)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    path.write_text("".join(f"{json.dumps(chat)}\n" for chat in chats), encoding="utf-8")


def _capitals(path):
    row = {"choices": ["Quito", "Lima"], "label": 1, "note": "", "language": "en", "topic": "America"}
    rows = [{"question": f"Capital of Peru, asked in {path.stem} {i}?", **row} for i in range(4)]
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")


def _pairs_of_sentences(path):
    rows = [{"sentence1": f"It is {i}.", "sentence2": f"{i} it is.", "label": i % 2} for i in range(3600)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _sample_split(split):
    def write(path):
        prepare_sample(path.parent / "sample")
        shutil.copy(path.parent / "sample" / f"{split}.json", path)

    return write


def _skills(seed, *kinds):
    def make(path):
        for number, kind in enumerate(kinds):
            make_lora(MODEL, path.parent / kind, seed + number)
            write_rows(path.parent / f"{kind}.json", KINDS.get(kind, ("why?", "who?", "how?")))
        adapters = [f"{kind}={path.parent / kind}" for kind in kinds]
        data = [str(path.parent / f"{kind}.json") for kind in kinds]
        assert main(["skills", "add", str(path), *adapters, "--base_model", MODEL, "--data", *data]) == 0

    return make


MAKERS = {
    **dict.fromkeys(["runs/first", "runs/second"], _run),
    "runs/quickstart": _quickstart,
    **dict.fromkeys(["my-adapter", "adapter"], _adapter),
    **dict.fromkeys(["scienceqa_mola", "./old_adapter"], _published),
    "adapters": lambda path: _adapter(path / "third"),
    **{name: _all_layers(seed) for seed, name in enumerate(["lora_a", "lora_b"])},
    **{name: _lora(seed) for seed, name in enumerate(["other-lora", "lora_from_elsewhere"])},
    **{f"runs/{kind}": _lora(seed) for seed, kind in enumerate(KINDS)},
    **{f"data/{kind}_{split}.json": _rows(words) for kind, words in KINDS.items() for split in ("train", "test")},
    "data/tense_test.json": _rows(("{[]}", "=+", "~~")),
    **dict.fromkeys(["tools.json", "tools.jsonl"], _rows(("<>", "@@", "##"))),
    **dict.fromkeys(["birds.jsonl", "mine.jsonl", "data/more.jsonl"], _rows(KINDS["sentence"])),
    "chats.jsonl": _chats,
    **dict.fromkeys(["train.json", "a.json", "b.json"], _sample_split("train")),
    **dict.fromkeys(["train.jsonl", "test.jsonl"], _capitals),
    "mrpc.jsonl": _pairs_of_sentences,
    "test.json": _sample_split("test"),
    "my-skills": _skills(0, *KINDS),
    "other-skills": _skills(9, "riddles"),
}


def named(page):
    """The supplies that the marked blocks of a page name and do not write."""
    marked = [block for block in blocks(page) if block.mark]
    words = set()
    for block in marked:
        if block.kind == "bash":
            words.update(part for line in lines(block) for word in line for part in re.split("[=,]", word))
        else:
            words.update(re.findall(r'"([^"\n]+)"', block.text))
    written = {path for block in marked for match in _WRITTEN.findall(block.text) for path in match}
    return sorted((words & MAKERS.keys()) - written)


def supply(page, folder: Path, made: Path):
    """Copy to `folder` what the page names; `made` keeps it for other pages."""
    for name in named(page):
        kept = made / name.replace("/", "-").strip(".-") / "it" / name
        if not kept.exists():
            kept.parent.mkdir(parents=True)
            MAKERS[name](kept)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if kept.is_dir() else shutil.copy)(kept, folder / name)
        for path in (*(folder / name).rglob("adapter_config.json"), *(folder / name).rglob("skills.json")):
            text = path.read_text(encoding="utf-8")  # the base model's folder is that of the page that was first
            path.write_text(re.sub(r'"/[^"]*/my-model"', json.dumps(str(folder / "my-model")), text), encoding="utf-8")
