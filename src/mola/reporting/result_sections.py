"""Sections about results: accuracy, loss of free text, a plain LoRA in place of the mixture, loss, samples."""

from collections.abc import Mapping, Sequence
from typing import Any

from mola.checkpoints.recorded_base import model_name
from mola.evaluation.scoring import loss_interval
from mola.reporting.charts import Line, thinned, value_axis
from mola.reporting.commands import evaluate_command, inspect_command, measures_loss
from mola.reporting.document import Table
from mola.reporting.formatting import MAX_ROWS, NO_VALUE, format_interval, number, percent, points, rows_note
from mola.reporting.heatmaps import answer_map
from mola.reporting.load_run import Run

# ---------------------------------------------------------------------- accuracy

_CSS_CLASSES = {"before": "b", "after": "a"}
_MAX_GROUPS = 40  # groups in the chart; the table has all

Results = Mapping[str, Mapping[str, Any]]  # keys `before` and `after`


def accuracy_section(run: Run) -> dict[str, Any] | None:
    """Accuracy before and after, over all samples and by group; None if the run's data are free text."""
    if measures_loss(run):
        return None
    results = run.accuracies
    rows = _accuracy_rows(results) if results else []
    largest = sorted(range(1, len(rows)), key=lambda index: -rows[index]["total"])[:_MAX_GROUPS]
    return {
        "results": results,
        "css_classes": _CSS_CLASSES,
        "rows": rows,
        "shown": [*rows[:1], *(rows[index] for index in sorted(largest))],
        "numbers": _accuracy_table(rows, results),
        "mistaken": _mistaken(results),
        "different": _different_settings(results),
        "missing": _missing(run, results),
    }


def _mistaken(results: Results) -> list[str]:
    """Names of results that were measured without an adapter instead of with one, or the other way round."""
    return [name for name, result in results.items() if bool(result["settings"].get("adapter")) != (name == "after")]


def _missing(run: Run, results: Results) -> dict[str, str]:
    """The commands that make the missing results; the keys say "without" or "with" the adapter."""
    needed = {"before": "without", "after": "with"}
    return {word: evaluate_command(run, name) for name, word in needed.items() if name not in results}


def _accuracy_rows(results: Results) -> list[dict[str, Any]]:
    """A row for all samples, then one for each group; `parts` of a row are the results that have this group."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {"all": dict(results)}
    for name, result in results.items():
        for column, values in result["groups"].items():
            for value, row in values.items():
                rows.setdefault(f"{column}: {value}", {})[name] = row
    return [
        {
            "label": label,
            "parts": parts,
            "total": max(part["total"] for part in parts.values()),
            "measured": [(_CSS_CLASSES[name], part["accuracy"], part["interval_95"]) for name, part in parts.items()],
        }
        for label, parts in rows.items()
    ]


def _different_settings(results: Results) -> list[str]:
    """Names of the settings that differ, so that the accuracies of the results cannot be compared."""
    settings = [result["settings"] for result in results.values()]
    # Prompts are compared instead of templates, since a task may choose the template.
    prompts = [sample["prompt"] for result in results.values() for sample in result["samples"][:1]]
    values = {
        "data": [result.get("data_fingerprint") for result in results.values()],
        "scoring": [each.get("scoring") for each in settings],
        "base model": [model_name(str(each.get("base_model"))) for each in settings],
        "prompts": prompts,
        "longest answer": [each.get("max_new_tokens") for each in settings if each.get("scoring") != "likelihood"],
    }
    return [what for what, found in values.items() if len(set(found)) > 1]


def _accuracy_table(rows: list[dict[str, Any]], results: Results) -> Table:
    head = ["samples", "number", *(f"{part} {name}" for name in results for part in ("accuracy", "interval"))]
    lines = []
    for row in rows:
        line = [row["label"], row["total"]]
        for name in results:
            part = row["parts"].get(name)
            line += [percent(part["accuracy"]), format_interval(part["interval_95"])] if part else [NO_VALUE, NO_VALUE]
        lines.append(line)
    return Table(head, lines, "Accuracy by group")


# ---------------------------------------------------------------------- loss of free text


def free_text_section(run: Run) -> dict[str, Any] | None:
    """Loss of free text before and after, and the difference on the same rows; None if accuracy is measured."""
    results = run.losses
    if not results and not measures_loss(run):
        return None
    rows = [
        (
            name,
            *(number(result[key]) for key in ("loss", "perplexity", "loss_per_byte")),
            _nats_interval(result["interval_95"]),
            *(number(result[key]) for key in ("total", "tokens")),
        )
        for name, result in results.items()
    ]
    head = ("adapter", "loss", "perplexity", "loss per byte", "95 % interval of the loss", "rows", "tokens")
    return {
        "table": Table(head, rows, "Loss in nats") if rows else None,
        "difference": _loss_difference(results),
        "mistaken": _mistaken(results),
        "different": _different_losses(results),
        "missing": _missing(run, results),
    }


def _nats_interval(bounds: Sequence[float] | None) -> str:
    return NO_VALUE if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def _loss_difference(results: Results) -> str | None:
    """Loss after minus loss before with its interval, if both were measured on the same tokens."""
    if len(results) < 2 or _different_losses(results):
        return None
    before, after = (results[name]["samples"] for name in ("before", "after"))
    changes = [new["loss"] - old["loss"] for old, new in zip(before, after, strict=True)]
    tokens = [sample["tokens"] for sample in after]
    interval = loss_interval(changes, tokens)
    words = "" if interval is None else f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    return f"{sum(changes) / sum(tokens):+.3f}{words}"


def _different_losses(results: Results) -> list[str]:
    """Names of what differs, so that the losses of the results cannot be compared."""
    settings = [result["settings"] for result in results.values()]
    values: dict[str, list[Any]] = {
        "data": [result.get("data_fingerprint") for result in results.values()],
        "base model": [model_name(str(each.get("base_model"))) for each in settings],
        "templates": [each.get("template") for each in settings],
        "tokens": [str([sample["tokens"] for sample in result["samples"]]) for result in results.values()],
    }
    return [what for what, found in values.items() if len(set(found)) > 1]


# ---------------------------------------------------------------------- a plain LoRA in place of the mixture

_MODELS = {"base": "base model", "mixture": "mixture", "lora": "LoRA"}


def worth_section(run: Run) -> dict[str, Any] | None:
    """How a plain LoRA does in place of the mixture, from `mola convert --to lora`; None if there is no such LoRA."""
    export = run.export
    if export is None:
        return None
    accuracies = []
    for name, row in export["accuracy"].items():
        difference = export["differences"].get(name)
        cells = (points(difference["value"]), _points_interval(difference)) if difference else (NO_VALUE, NO_VALUE)
        accuracies.append(
            (_MODELS.get(name, name), percent(row["accuracy"]), format_interval(row["interval_95"]), *cells)
        )
    losses = [
        (kind, f"{divergence:.4f}", *(f"{export['loss'][kind][name]:.3f}" for name in _MODELS))
        for kind, divergence in export["divergence"].items()
        if kind in export["loss"]
    ]
    explained = [(kind, percent(value)) for kind, value in export["explained_by_kind"].items()]
    tables = [
        Table(
            ("answers by", "accuracy", "95 % interval", "less the mixture, points", "95 % interval"),
            accuracies,
            "Same questions",
        ),
        Table(
            ("tokens of", "KL(mixture || LoRA)", *(f"loss of {name}" for name in _MODELS.values())),
            losses,
            "Nats per token",
        ),
        Table(("linears", "explained"), explained, "Share of the mixture's squared update that the LoRA has"),
    ]
    lora = export["differences"].get("lora")
    return {
        "export": export,
        "difference": None if lora is None else f"{points(lora['value'])} points, {_points_interval(lora)}",
        "notes": export.get("notes", []),
        "tables": [table for table in tables if table.rows],
    }


def _points_interval(difference: Mapping[str, Any]) -> str:
    return " to ".join(map(points, difference["questions_95"]))


# ---------------------------------------------------------------------- loss


def loss_section(run: Run) -> dict[str, Any]:
    """The loss curves."""
    if not run.curves:
        return {"lines": [], "has_record": run.has_record, "file": run.losses_file}
    curves = {label: thinned(curve) for label, curve in run.curves.items()}
    lines = [
        Line(f"{label}, last {number(run.curves[label][-1][1])}", curve, "a" if label == "training" else "b")
        for label, (curve, _) in curves.items()
    ]
    by_step = [dict(curve) for curve in run.curves.values()]
    steps = sorted({step for curve in by_step for step in curve})
    rows = [(step, *(number(curve.get(step)) for curve in by_step)) for step in steps[-MAX_ROWS:]]
    head = ("step", *(f"{label} loss" for label in run.curves))
    return {
        "lines": lines,
        "axis": value_axis([value for line in lines for _, value in line.points], may_be_log=True),
        "points_per_mean": [(label, count) for label, (_, count) in curves.items() if count > 1],
        "file": run.losses_file,
        "numbers": Table(head, rows, f"Loss by step{rows_note(len(steps))}"),
    }


# ---------------------------------------------------------------------- samples

_MAX_SAMPLES = 40
_MAX_CHARACTERS = 2000  # characters of a prompt
_OUTCOMES = {
    (False, True): "newly correct",
    (True, False): "newly wrong",
    (False, False): "still wrong",
    (True, True): "still correct",
}

Pair = tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]  # a sample before and after


def samples_section(run: Run) -> dict[str, Any] | None:
    """Questions with answers before and after, and the experts used for the expected answers; None for free text."""
    if measures_loss(run):
        return None
    if not run.accuracies:
        return {"counts": [], "samples": [], "left_out": 0, "command": evaluate_command(run, "after")}
    pairs = _pairs(run)
    experts = _experts_by_id(run, pairs)

    def rank(index: int) -> tuple[bool, bool, int]:
        """Sort key: samples with experts come first, then those that changed or are wrong."""
        pair = pairs[index]
        identifier = str((pair[1] or pair[0] or {})["id"])
        return identifier not in experts, _outcome(pair) in ("still correct", "correct"), index

    shown = sorted(sorted(range(len(pairs)), key=rank)[:_MAX_SAMPLES])
    outcomes = [_outcome(pair) for pair in pairs]
    words = [word for word in (*_OUTCOMES.values(), "correct", "wrong") if word in outcomes]
    return {
        "counts": [(outcomes.count(word), word) for word in words],
        "samples": [_compared_sample(pairs[index], experts) for index in shown],
        "left_out": len(pairs) - len(shown),
        "command": None if experts or not run.has_routers else inspect_command(run),
    }


def inspected_samples_section(inspection: Mapping[str, Any]) -> dict[str, Any] | None:
    """Samples of a `mola inspect` result, with the experts used for the expected answers."""
    samples = [_sample(example["id"], example, example["experts"]) for example in inspection.get("examples") or []]
    return {"counts": [], "samples": samples, "left_out": 0, "command": None} if samples else None


def _pairs(run: Run) -> list[Pair]:
    """Samples before and after by their ids, in the order of the newer result."""
    before, after = (
        {str(sample["id"]): sample for sample in run.accuracies.get(name, {}).get("samples", [])}
        for name in ("before", "after")
    )
    return [(before.get(identifier), after.get(identifier)) for identifier in (after or before)]


def _experts_by_id(run: Run, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The experts used for inspected samples. A sample with the same id but a different prompt does not count."""
    prompts = {str(sample["id"]): sample["prompt"] for pair in pairs for sample in pair if sample is not None}
    inspected = {str(example["id"]): example for example in (run.inspection or {}).get("examples") or []}
    return {
        identifier: example["experts"]
        for identifier, example in inspected.items()
        if example.get("prompt") in (None, prompts.get(identifier))
    }


def _outcome(pair: Pair) -> str:
    before, after = pair
    if before is None or after is None:
        return "correct" if (after or before or {})["correct"] else "wrong"
    return _OUTCOMES[bool(before["correct"]), bool(after["correct"])]


def _compared_sample(pair: Pair, experts: Mapping[str, Any]) -> dict[str, Any]:
    newest = pair[1] or pair[0] or {}
    answers = [
        (name, {**sample, "output": _shortened(" ".join((sample["output"] or "").split()), 300)})
        for name, sample in zip(("before", "after"), pair, strict=True)
        if sample is not None
    ]
    return _sample(_outcome(pair), newest, experts.get(str(newest["id"])), answers)


def _sample(
    tag: str, sample: Mapping[str, Any], experts: Sequence[Mapping[str, Any]] | None, answers: Sequence[Any] = ()
) -> dict[str, Any]:
    return {
        "tag": tag,
        "question": _title(sample["prompt"]),
        "prompt": _shortened(sample["prompt"], _MAX_CHARACTERS).strip("\n"),
        "expected": sample["answer"] or "",
        "answers": answers,
        "experts": answer_map(experts) if experts else None,
    }


def _title(prompt: str) -> str:
    """The line of a prompt that has the question, else its longest line."""
    lines = [" ".join(line.split()) for line in prompt.splitlines() if line.strip()]
    question = next((line for line in lines if line.startswith("Question:")), None)
    return _shortened((question or max(lines, key=len, default="")).removeprefix("Question: "), 160)


def _shortened(text: str, max_characters: int) -> str:
    left = len(text) - max_characters
    return text if left <= 0 else f"{text[:max_characters]} … ({left:,} more characters in the result file)"
