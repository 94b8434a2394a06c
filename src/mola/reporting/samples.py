"""The section of samples: questions, answers before and after, and the experts behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mola.reporting.commands import evaluate_command, inspect_command, missing
from mola.reporting.heat import answer_map
from mola.reporting.load_run import Run
from mola.reporting.markup import Element, element, note

_MOST_SAMPLES = 40
_MOST_CHARACTERS = 2000
_OUTCOMES = {
    (False, True): "newly right",
    (True, False): "newly wrong",
    (False, False): "still wrong",
    (True, True): "still right",
}

Pair = tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]


def samples_section(run: Run) -> list[Element]:
    """Questions with the answers before and after, and the experts behind the answers."""
    result = run.after or run.before
    if result is None:
        return [missing("There are no answers to show.", evaluate_command(run, "after"))]
    inspected = (run.inspection or {}).get("examples") or []
    experts = {str(example["id"]): example["experts"] for example in inspected}
    pairs = _pairs(run)
    shown = sorted(range(len(pairs)), key=lambda index: (_rank(pairs[index], experts), index))[:_MOST_SAMPLES]
    counts = [(word, sum(_outcome(pair) == word for pair in pairs)) for word in _outcomes(pairs)]
    content = [
        element("p", f"{', '.join(f'{count:,} {word}' for word, count in counts)}."),
        element("div", [_sample(pairs[index], experts) for index in sorted(shown)], class_="samples"),
    ]
    if len(shown) < len(pairs):
        content.append(note(f"{len(shown)} of {len(pairs):,} samples are shown; the result files have all."))
    if not experts:
        text = "Which experts answered is not known."
        content.append(missing(text, inspect_command(run, *(["--overwrite"] if run.inspection else []))))
    return content


def looked_at_samples(inspection: Mapping[str, Any]) -> list[Element]:
    """Samples of `mola inspect` with the experts behind the expected answers.

    Args:
        inspection: content of its result file.
    """
    shown = [
        element(
            "details",
            element("summary", element("span", example["id"], class_="tag"), _question(example["prompt"])),
            _prompt(example["prompt"]),
            element("ul", _expected(example["answer"]), class_="answers"),
            answer_map(example["experts"]),
        )
        for example in inspection.get("examples") or []
    ]
    return [element("div", shown, class_="samples")] if shown else []


def _pairs(run: Run) -> list[Pair]:
    """Samples before and after by their ids, in the order of the newer result."""
    before = {str(sample["id"]): sample for sample in (run.before or {}).get("samples", [])}
    after = {str(sample["id"]): sample for sample in (run.after or {}).get("samples", [])}
    return [(before.get(identifier), after.get(identifier)) for identifier in (after or before)]


def _outcome(pair: Pair) -> str:
    old, new = pair
    if old is None or new is None:
        return "right" if (new or old or {})["correct"] else "wrong"
    return _OUTCOMES[bool(old["correct"]), bool(new["correct"])]


def _outcomes(pairs: Sequence[Pair]) -> list[str]:
    found = {_outcome(pair) for pair in pairs}
    return [word for word in (*_OUTCOMES.values(), "right", "wrong") if word in found]


def _rank(pair: Pair, experts: Mapping[str, Any]) -> tuple[bool, int]:
    """Samples with experts first, then those that say most about the training."""
    identifier = str((pair[1] or pair[0] or {})["id"])
    return identifier not in experts, _outcomes([pair]) == ["still right"]


def _sample(pair: Pair, experts: Mapping[str, Any]) -> Element:
    old, new = pair
    newest = new or old or {}
    answers = [
        (name, sample["predicted"] or "no answer", sample["correct"], sample["output"])
        for name, sample in (("before", old), ("after", new))
        if sample is not None
    ]
    rows = [
        element(
            "li",
            element("b", name),
            element("span", ("✓ " if right else "✗ ") + str(predicted), class_="right" if right else "wrong"),
            element("q", _shortened(" ".join(output.split()), 300)),
        )
        for name, predicted, right, output in answers
    ]
    found = experts.get(str(newest["id"]))
    return element(
        "details",
        element(
            "summary",
            element("span", _outcome(pair), class_=f"tag {_outcome(pair).replace(' ', '-')}"),
            _question(newest["prompt"]),
        ),
        _prompt(newest["prompt"]),
        element("ul", _expected(newest["answer"]), rows, class_="answers"),
        found and answer_map(found),
    )


def _question(prompt: str) -> Element:
    return element("span", _title(prompt), class_="question")


def _prompt(prompt: str) -> Element:
    text = _shortened(prompt, _MOST_CHARACTERS).strip("\n")
    return element("pre", text, tabindex=0, role="group", aria_label="prompt")


def _expected(answer: str) -> Element:
    return element("li", element("b", "expected"), element("span", answer))


def _title(prompt: str) -> str:
    """The line of a prompt that says most: the question, else the longest."""
    lines = [" ".join(line.split()) for line in prompt.splitlines() if line.strip()]
    question = next((line for line in lines if line.startswith("Question:")), None)
    return _shortened((question or max(lines, key=len, default="")).removeprefix("Question: "), 160)


def _shortened(text: str, most: int) -> str:
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]} … ({left:,} more characters in the result file)"
