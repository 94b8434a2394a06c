"""What the tests of the scripts share: running one as a program, data as the preparation script writes them."""

import json
import runpy
import sys
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parents[2] / "scripts"
SEVEN = "q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj"
COLUMNS = [
    "image",
    "question",
    "choices",
    "answer",
    "hint",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
    "input",
    "instruction",
    "output",
]


def run_script(name, monkeypatch, *words):
    """Exit code of a script, run in this process with these words."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    try:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    except SystemExit as exit:
        return exit.code or 0
    return 0


def error_line(name, capsys):
    """The one line on stderr that says what was wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}: error: ")]
    assert len(lines) == 1
    return lines[0]


def rows(count, first=0):
    """Prepared rows with the columns of the preparation script."""
    made = []
    for index in range(first, first + count):
        letter = "AB"[index % 2]
        row = dict.fromkeys(COLUMNS, "") | {
            "image": None,
            "question": f"Is {index} even?",
            "choices": ["yes", "no"],
            "answer": letter,
            "subject": "arithmetic",
            "instruction": f"Context: N/A\nQuestion: Is {index} even?\nOptions: (A) yes (B) no\n",
            "output": f"Answer: The answer is {letter}.",
        }
        made.append(row)
    return made


def write_dataset(folder, sizes):
    """A `science_qa.hf` with so many rows per split."""
    first, splits = 0, {}
    for name, size in sizes.items():
        splits[name] = datasets.Dataset.from_list(rows(size, first))
        first += size
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def write_json(path, count):
    """A `scienceq_test.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows(count)), encoding="ascii")
    return path


def character_tokenizer(folder):
    """One token per printable character, fewer than 256 in all: for the recorded base model."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "Ċ", *characters])}
    vocabulary["Ġ"] = vocabulary.pop(" ")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
