"""`python -m benchmarks.skills_decisions`: which skill is asked for real text, and for text that is not as trained.

    python -m benchmarks.skills_decisions --base_model FOLDER --data cola=cola_train.jsonl mrpc=mrpc_train.jsonl \\
      --unknown alpaca=alpaca.jsonl --output records.json

Decisions alone, without LoRAs. Each kind has a file that mola reads. The text of a row is that of its columns hint,
sentence, sentence1, sentence2, question, instruction and input, without a word about the task. Choices, if the row has
some, follow as "(A) first (B) second", as mola's tasks write them; `--choices false` leaves them out.
Training rows differ from seed to seed, test rows are the same, and none is both. Test prompts are changed in ways
that the statistics have not seen (`benchmarks/text_shifts.py`).

Beside the skills stands a text classifier: TF-IDF of words and pairs of words, and logistic regression, fit on the same
rows and given the same content. It needs scikit-learn (`pip install scikit-learn`), and is left out without it.
"""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.errors import in_one_line
from benchmarks.text_shifts import code_texts, content_shifts, manual_paragraphs
from benchmarks.trained_apart import fit_text_classifier
from mola.data.read import read_rows
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.generation.predicting import encode_prompts
from mola.models.loading import load_model
from mola.models.skills import content_finder
from mola.models.tokenizer import load_tokenizer
from mola.options.fields import option
from mola.options.parsing import parse
from mola.reporting.formatting import markdown_table, points
from mola.skills.measuring import features_at
from mola.skills.options import split_pairs
from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.decision import Decider, suggest_threshold
from mola.tuner.skills.general_text import general_texts
from mola.tuner.skills.lower_layers import decoder_layers
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics

logger = logging.getLogger("benchmarks")

_COLUMNS = ("hint", "sentence", "sentence1", "sentence2", "question", "instruction", "input")
_TEMPLATE = "alpaca_short"  # of training and of all prompts whose shift is no template
_OTHER_TEMPLATE = "Q: {}\nA:"  # one that mola does not know
_READ_AT_ONCE = 64  # prompts, sorted by length


@dataclass
class DecisionOptions:
    """Options of `python -m benchmarks.skills_decisions`."""

    base_model: str = option("", "Folder of the base model.")
    data: list[str] = field(default_factory=list, metadata={"help": "Rows of each kind, NAME=FILE."})
    unknown: list[str] = field(default_factory=list, metadata={"help": "Rows that no skill is for, NAME=FILE."})
    last_lines: list[str] = field(
        default_factory=list, metadata={"help": "Last line of every text of a kind, NAME=TEXT, for kinds of one file."}
    )
    rows: int = option(100, "Training rows, and test rows, of each kind.")
    long_rows: int = option(20, "Test rows of each kind with the long preamble.")
    preambles: list[int] = field(default_factory=lambda: [60, 600], metadata={"help": "Tokens of the two preambles."})
    choices: bool = option(True, "Whether the text of a row has its choices.")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the training rows."})
    layer: int | None = option(None, "Layer whose input is read. Default: a third of the layers.")
    reject_rate: float = option(0.02, "Share of the skills' own examples that may go to the base model.")
    dtype: str = option("auto", "Dtype of the base model: auto, float32 or bfloat16.")
    output: str | None = option(None, "Result file (JSON); it has numbers, and no text.")


@in_one_line("benchmarks.skills_decisions")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON if asked for; returns 0, the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(DecisionOptions, words, prog="python -m benchmarks.skills_decisions", summary=__doc__ or "")
    output = None if options.output is None else check_writable(options.output)
    record = measure(options)
    print(table(record))
    if output is not None:
        atomic_write_json(output, record)
    return 0


class _Reader:
    """Features and text of prompts; content that was read before is not read again."""

    def __init__(self, options: DecisionOptions) -> None:
        self.model = load_model(options.base_model, None, options.dtype)
        self.tokenizer = load_tokenizer(options.base_model)
        num_layers = len(decoder_layers(self.model))
        self.layer = num_layers // 3 if options.layer is None else options.layer
        self._finder, self._plain_finder = content_finder(self.tokenizer), ContentFinder(self.tokenizer)
        self._found: dict[tuple[int, ...], torch.Tensor] = {}

    def in_template(self, texts: Sequence[str], name: str) -> list[list[int]]:
        """Token ids of texts in one of mola's templates, or in the chat template."""
        template = get_template(name, self.tokenizer)
        return encode_prompts(self.tokenizer, [template.prompt(text) for text in texts], template)

    def contents(self, prompts: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
        """The content of each prompt."""
        return [tuple(self._finder.content(prompt)) for prompt in prompts]

    def text(self, content: tuple[int, ...]) -> str:
        """The words of a content, for the text classifier."""
        return str(self.tokenizer.decode(content, skip_special_tokens=True))

    def features(self, contents: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Features of each content."""
        missing = sorted({each for each in contents if each not in self._found}, key=lambda each: (len(each), each))
        for begin in range(0, len(missing), _READ_AT_ONCE):
            part = missing[begin : begin + _READ_AT_ONCE]
            self._found |= zip(part, features_at(self.model, self.layer, self._plain_finder, part), strict=True)
        return [self._found[each] for each in contents]


def measure(options: DecisionOptions) -> dict[str, Any]:
    """Decisions on every kind of prompt; the record, without text.

    Raises:
        MolaError: fewer than two kinds, or too few rows.
    """
    sources, unknown = (
        split_pairs("data", options.data, "NAME=FILE"),
        split_pairs("unknown", options.unknown, "NAME=FILE"),
    )
    if len(sources) < 2:
        raise MolaError(f"`data` must have at least two kinds, NAME=FILE each: got {len(sources)}.")
    lines = split_pairs("last_lines", options.last_lines, "NAME=TEXT")
    rows = {name: _texts(options, name, path, 2 * options.rows) for name, path in sources.items()}
    rows = {name: [f"{text}\n{lines[name]}" if name in lines else text for text in rows[name]] for name in rows}
    tests = {name: each[: options.rows] for name, each in rows.items()}
    reader = _Reader(options)
    shifted = {
        shift: {name: reader.contents(prompts) for name, prompts in by_kind.items()}
        for shift, by_kind in _shifted_prompts(options, reader, tests).items()
    }
    others = {name: _texts(options, name, path, 1)[: options.rows] for name, path in unknown.items()}
    others |= {"Python's manual": list(manual_paragraphs()[:: len(manual_paragraphs()) // options.rows + 1])}
    others |= {"Python's source code": list(code_texts()[: options.rows])}
    other_contents = {name: reader.contents(reader.in_template(texts, _TEMPLATE)) for name, texts in others.items()}
    general = encode_prompts(reader.tokenizer, general_texts())
    base = GeneralStatistics.of_features(reader.features([tuple(each) for each in general]))
    runs = []
    for seed in options.seeds:
        draw = random.Random(seed)
        train = {
            name: reader.contents(reader.in_template(draw.sample(each[options.rows :], options.rows), _TEMPLATE))
            for name, each in rows.items()
        }
        runs.append({"seed": seed, **_decide(options, reader, base, train, shifted, other_contents)})
        logger.info("Seed %d is done.", seed)
    named = {"base_model": Path(options.base_model).name, "data": sorted(sources), "unknown": sorted(unknown)}
    return {
        "options": {**asdict(options), **named, "output": None},
        "layer": reader.layer,
        "machine": machine_description(),
        "versions": software_versions(),
        "runs": runs,
    }


def _texts(options: DecisionOptions, name: str, path: str, fewest: int) -> list[str]:
    """The different texts of a file in a fixed random order."""
    found = [text for text in dict.fromkeys(_text(row, options.choices) for row in read_rows(path)) if text]
    if len(found) < fewest:
        raise MolaError(f"`data` must have at least {fewest} different texts of each kind: {name!r} has {len(found)}.")
    random.Random(0).shuffle(found)
    return found


def _text(row: Mapping[str, Any], with_choices: bool) -> str:
    parts = [str(row[column]) for column in _COLUMNS if row.get(column)]
    if with_choices and (choices := row.get("choices")):
        parts.append(" ".join(f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)))
    return "\n".join(parts)


def _shifted_prompts(
    options: DecisionOptions, reader: _Reader, tests: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, list[list[int]]]]:
    """Shift -> kind -> token ids of each test prompt."""
    if len(options.preambles) != 2 or options.preambles != sorted(options.preambles):
        raise MolaError(f"`preambles` must be two growing numbers of tokens: got {options.preambles}.")
    draw, names = random.Random(0), sorted(tests)
    found: dict[str, dict[str, list[list[int]]]] = {}
    for shift, change in content_shifts(reader.tokenizer, (options.preambles[0], options.preambles[1])).items():
        limit = options.long_rows if str(options.preambles[1]) in shift else options.rows
        found[shift] = {}
        for place, name in enumerate(names):
            other = tests[names[(place + 1) % len(names)]]
            texts = [change(text, other[row], row, draw) for row, text in enumerate(tests[name][:limit])]
            found[shift][name] = reader.in_template(texts, _TEMPLATE)
    for shift, template in (("chat template", "chat"), ("long alpaca template", "alpaca")):
        if template != "chat" or reader.tokenizer.chat_template:
            found[shift] = {name: reader.in_template(texts, template) for name, texts in tests.items()}
    found["template that mola does not know"] = {
        name: encode_prompts(reader.tokenizer, [_OTHER_TEMPLATE.format(text) for text in texts])
        for name, texts in tests.items()
    }
    return found


Contents = Mapping[str, Sequence[tuple[int, ...]]]  # kind -> content of each prompt


def _decide(
    options: DecisionOptions,
    reader: _Reader,
    base: GeneralStatistics,
    train: Contents,
    shifted: Mapping[str, Contents],
    others: Contents,
) -> dict[str, Any]:
    """Who is asked: for each shift and kind, and for text that no skill is for, the number of prompts by name."""
    skills = {name: SkillStatistics.of_features(reader.features(contents)) for name, contents in train.items()}
    decider = Decider(base, skills, suggest_threshold(base, skills, options.reject_rate))
    always = Decider(base, skills, float("-inf"))
    classifier = _text_classifier(reader, train)

    def asked(contents: Sequence[tuple[int, ...]]) -> dict[str, dict[str, int]]:
        features = reader.features(contents)
        found = {
            "skills": [name or "base" for name in decider.decide_features(features).names],
            "skills without threshold": always.decide_features(features).names,
        }
        if classifier is not None:
            found["text classifier"] = [
                str(each) for each in classifier.predict([reader.text(each) for each in contents])
            ]
        return {method: dict(Counter(map(str, names))) for method, names in found.items()}

    left_out = {}
    for name in train:
        rest = {other: each for other, each in skills.items() if other != name}
        without = Decider(base, rest, suggest_threshold(base, rest, options.reject_rate))
        names = without.decide_features(reader.features(shifted["as trained"][name])).names
        left_out[name] = dict(Counter(each or "base" for each in names))
    return {
        "threshold": decider.threshold,
        "shifts": {
            shift: {name: asked(contents) for name, contents in by_kind.items()} for shift, by_kind in shifted.items()
        },
        "others": {name: asked(contents)["skills"] for name, contents in others.items()},
        "left out": left_out,
    }


def _text_classifier(reader: _Reader, train: Contents) -> Any:
    """See `fit_text_classifier`; None without scikit-learn."""
    texts = [(reader.text(content), name) for name, contents in train.items() for content in contents]
    try:
        return fit_text_classifier(texts)
    except ImportError:
        logger.info("The text classifier is left out: pip install scikit-learn")
        return None


def table(record: Mapping[str, Any]) -> str:
    """The tables in Markdown: means over seeds and kinds, in per cent."""
    runs = record["runs"]
    methods = [*next(iter(runs[0]["shifts"]["as trained"].values()))]
    rows = []
    for shift in runs[0]["shifts"]:
        kinds = [pair for run in runs for pair in run["shifts"][shift].items()]
        shares = [fmean(_share(found[method], kind) for kind, found in kinds) for method in methods]
        to_base = fmean(_share(found["skills"], "base") for _, found in kinds)
        rows.append([shift, *(points(each, "") for each in (*shares, to_base))])
    parts = [markdown_table(("test prompts", *(f"{each}, right" for each in methods), "skills, to the base"), rows)]
    names = [("others", name, name) for name in runs[0]["others"]]
    names += [("left out", name, f"{name}, with the skills of the other kinds") for name in runs[0]["left out"]]
    rows = [
        [words, points(fmean(_share(run[where][name], "base") for run in runs), "")] for where, name, words in names
    ]
    parts.append(markdown_table(("prompts that no skill is for", "to the base"), rows))
    return "\n\n".join(parts)


def _share(counts: Mapping[str, int], name: str) -> float:
    return counts.get(name, 0) / sum(counts.values())


if __name__ == "__main__":
    sys.exit(main())
