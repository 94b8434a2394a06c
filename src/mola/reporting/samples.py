"""Samples: questions, answers before and after, and the experts behind the expected answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from mola.reporting.commands import evaluate_command, has_answers, inspect_command
from mola.reporting.heat import answer_map
from mola.reporting.load_run import Run

_MOST_SAMPLES = 40
_MOST_CHARACTERS = 2000
_OUTCOMES = {
    (False, True): "newly right",
    (True, False): "newly wrong",
    (False, False): "still wrong",
    (True, True): "still right",
}

Pair = tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]


def samples_section(run: Run) -> dict[str, Any]:
    """Questions with the answers before and after, and the experts behind the expected ones."""
    if run.after is None and run.before is None:
        command = evaluate_command(run, "after") if has_answers(run) else None
        return {"counts": [], "samples": [], "left_out": 0, "command": command}
    pairs = _pairs(run)
    experts = _experts(run, pairs)
    shown = sorted(range(len(pairs)), key=lambda index: (_rank(pairs[index], experts), index))[:_MOST_SAMPLES]
    return {
        "counts": [(sum(_outcome(pair) == word for pair in pairs), word) for word in _outcomes(pairs)],
        "samples": [_sample(pairs[index], experts) for index in sorted(shown)],
        "left_out": len(pairs) - len(shown),
        "command": None if experts or not run.has_routers else inspect_command(run),
    }


def _experts(run: Run, pairs: Sequence[Pair]) -> dict[str, Any]:
    """By id, the experts behind samples that were looked at; those of another text with the same id are not."""
    prompts = {str(sample["id"]): sample["prompt"] for old, new in pairs for sample in (old, new) if sample is not None}
    inspected = {str(example["id"]): example for example in (run.inspection or {}).get("examples") or []}
    return {
        identifier: example["experts"]
        for identifier, example in inspected.items()
        if example.get("prompt") in (None, prompts.get(identifier))
    }


def looked_at_samples(inspection: Mapping[str, Any]) -> dict[str, Any] | None:
    """Samples in a result of `mola inspect`, with the experts behind the expected answers."""
    samples = [_content(example["id"], example, example["experts"]) for example in inspection.get("examples") or []]
    return {"counts": [], "samples": samples, "left_out": 0, "command": None} if samples else None


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
    return identifier not in experts, _outcome(pair) in ("still right", "right")


def _sample(pair: Pair, experts: Mapping[str, Any]) -> dict[str, Any]:
    newest = pair[1] or pair[0] or {}
    answers = [
        (name, {**sample, "output": _shortened(" ".join((sample["output"] or "").split()), 300)})
        for name, sample in zip(("before", "after"), pair, strict=True)
        if sample is not None
    ]
    return _content(_outcome(pair), newest, experts.get(str(newest["id"])), answers)


def _content(
    tag: str, sample: Mapping[str, Any], experts: Sequence[Mapping[str, Any]] | None, answers: Sequence[Any] = ()
) -> dict[str, Any]:
    return {
        "tag": tag,
        "question": _title(sample["prompt"]),
        "prompt": _shortened(sample["prompt"], _MOST_CHARACTERS).strip("\n"),
        "expected": sample["answer"] or "",
        "answers": answers,
        "experts": answer_map(experts) if experts else None,
    }


def _title(prompt: str) -> str:
    """The line of a prompt that says most: the question, else the longest."""
    lines = [" ".join(line.split()) for line in prompt.splitlines() if line.strip()]
    question = next((line for line in lines if line.startswith("Question:")), None)
    return _shortened((question or max(lines, key=len, default="")).removeprefix("Question: "), 160)


def _shortened(text: str, most: int) -> str:
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]} … ({left:,} more characters in the result file)"
