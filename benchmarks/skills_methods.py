"""The ways that `benchmarks.skills_study` compares: each takes a `Study` and returns what goes into its record.

`marks` has one digit per test question of a kind, 1 for a correct answer, in the order of the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, PeftModel

from benchmarks.errors import finished
from benchmarks.skills_study import PROTOCOL, REPLAY_SHARE, SEQUENTIAL, SKILL, TASKS, Study, sequence
from benchmarks.trained_apart import MERGES, fit_text_classifier, load_loras, merge
from mola import TrainOptions, load_model, train
from mola.evaluation.core import evaluate_examples
from mola.exporting.convert import ConvertOptions, convert
from mola.files.atomic import atomic_write_json
from mola.files.reading import read_json
from mola.models.tokenizer import load_tokenizer
from mola.studies.continual_learning.continual import continual
from mola.studies.continual_learning.record import EVALUATION_FOLDER, RECORD_FILE
from mola.studies.continual_learning.stages import check_stages

Found = dict[str, Any]


# ---------------------------------------------------------------------- answers of a model in memory


def marks_of(study: Study, model: Any, kind: str, wanted: Sequence[int] | None = None) -> str:
    """The marks of a model on the test questions of a kind, or on those with the `wanted` places."""
    examples = study.examples(kind, "test")
    chosen = examples if wanted is None else [examples[place] for place in wanted]
    tokenizer = load_tokenizer(study.options.base_model, "left")
    settings: dict[str, Any] = {"scoring": "likelihood", "batch_size": 40, "show_progress": False}
    result = evaluate_examples(model, tokenizer, study.task, chosen, template=PROTOCOL["template"], **settings)
    return "".join("01"[sample["correct"]] for sample in result.samples)


def on_all_kinds(study: Study, model: Any) -> Found:
    """The marks of one model on all kinds."""
    return {"marks": {kind: marks_of(study, model, kind) for kind in study.order}}


def base_model(study: Study, adapter: Path | None = None) -> Any:
    """The base model in float32, with one adapter or none."""
    return load_model(study.options.base_model, adapter, PROTOCOL["dtype"])


def all_skills(study: Study) -> PeftModel:
    """PEFT's model with every LoRA under the name of its kind."""
    return load_loras(base_model(study), {kind: study.skill(kind) for kind in study.order})


# ---------------------------------------------------------------------- trained apart


def skills(study: Study) -> Found:
    """`mola continual --growth skills`: OP and PD of its record, who was asked, the old answers that changed."""
    options = sequence(study, "skills", SKILL, growth="skills")
    continual(options)
    return _of_sequence(study, options.output_dir)


def own(study: Study) -> Found:
    """Each question to the LoRA of its kind, which the caller names."""
    model = all_skills(study)
    marks = {}
    for kind in study.order:
        model.set_adapter(kind)
        marks[kind] = marks_of(study, model, kind)
    return {"marks": marks}


def own_from(layer: int) -> Callable[[Study], Found]:
    """Like `own`, of LoRAs that adapt the layers from `layer` on, in as many steps."""

    def measure(study: Study) -> Found:
        options = sequence(study, f"from_layer_{layer}", {**SKILL, "layer": layer}, growth="skills")
        marks, seconds = {}, []
        for stage in check_stages(options):
            result = finished(train(stage.options))
            seconds.append(round(result.seconds, 1))
            marks[stage.name] = marks_of(study, base_model(study, stage.folder), stage.name)
        shutil.rmtree(str(options.output_dir))
        return {"marks": marks, "seconds_training": seconds}

    return measure


def text_classifier(study: Study) -> Found:
    """Each question to the LoRA that a text classifier names.

    Where it names the LoRA of the question's kind, the answer is that of `own`.
    """
    texts = [(row["instruction"], kind) for kind in study.order for row in study.examples(kind, "train")]
    classifier = fit_text_classifier(texts)
    answers = study.record["methods"].get("own") or own(study)
    model = all_skills(study)
    marks, asked = {}, {}
    for kind in study.order:
        named = [str(each) for each in classifier.predict([row["instruction"] for row in study.examples(kind, "test")])]
        asked[kind] = {name: named.count(name) for name in sorted(set(named))}
        found = list(answers["marks"][kind])
        for name in asked[kind].keys() - {kind}:
            model.set_adapter(name)
            places = [place for place, each in enumerate(named) if each == name]
            for place, mark in zip(places, marks_of(study, model, kind, places), strict=True):
                found[place] = mark
        marks[kind] = "".join(found)
    return {"marks": marks, "asked": asked}


# ---------------------------------------------------------------------- merged and routed by token


def merged(method: str) -> Callable[[Study], Found]:
    """All LoRAs in one."""

    def measure(study: Study) -> Found:
        model = all_skills(study)
        torch.manual_seed(study.seed)  # DARE drops at random
        return on_all_kinds(study, merge(model, study.order, method))

    return measure


def arrow(study: Study) -> Found:
    """PEFT's Arrow: each linear weighs the LoRAs for each token by their first singular directions.

    These are the last lines of PEFT's `create_arrow_model`, which itself would also look for LoRAs in the lower layers.
    """
    model = all_skills(study)
    settings = ArrowConfig(top_k=3, router_temperature=1.0)
    settings.task_adapter_names, settings.gks_adapter_names = list(study.order), []
    own = model.peft_config[study.order[0]]
    shape = {"r": own.r, "target_modules": own.target_modules, "layers_to_transform": own.layers_to_transform}
    model.add_adapter("arrow_router", LoraConfig(arrow_config=settings, **shape))
    model.set_adapter("arrow_router")
    return on_all_kinds(study, model.eval())


def converted(study: Study) -> Found:
    """`mola convert --from lora --data`: a mixture whose routers are fitted to tell the LoRAs' training rows apart."""
    output = study.folder / "converted"
    shutil.rmtree(output, ignore_errors=True)
    options = ConvertOptions(
        [str(study.skill(kind)) for kind in study.order],
        str(output),
        source_format="lora",
        base_model=study.options.base_model,
        num_experts=str(len(study.order)),
        data=[_rows_file(study, kind, study.rows(kind, "train")) for kind in study.order],
        task=TASKS[study.options.kinds],
        template=PROTOCOL["template"],
        dtype=PROTOCOL["dtype"],
    )
    convert(options)
    return on_all_kinds(study, base_model(study, output))


def _rows_file(study: Study, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    path = study.folder / "rows" / f"{name}.json"
    atomic_write_json(path, list(rows))
    return str(path)


# ---------------------------------------------------------------------- trained on all kinds


def joint(study: Study) -> Found:
    """One LoRA of rank 43 on all rows at once, in as many steps as the sequence has."""
    folder = study.folder / "joint"
    shutil.rmtree(folder, ignore_errors=True)
    options = TrainOptions(**{**study.training(), **SEQUENTIAL["lora"]}, output_dir=str(folder))
    result = finished(train(options))
    found = on_all_kinds(study, base_model(study, folder))
    shutil.rmtree(folder)
    return {**found, "steps": result.steps, "seconds_training": round(result.seconds, 1)}


def sequential(recipe: str) -> Callable[[Study], Found]:
    """One adapter learns one kind after the other: `mola continual`."""

    def measure(study: Study) -> Found:
        options = sequence(study, recipe, SEQUENTIAL[recipe])
        continual(options)
        found = _of_sequence(study, options.output_dir)
        shutil.rmtree(str(options.output_dir))
        return found

    return measure


def replay(study: Study) -> Found:
    """One LoRA learns one kind after the other, with 5 % of the rows of every earlier kind."""
    stages, kept = {}, []
    for kind in study.order:
        rows = study.rows(kind, "train")
        test = _rows_file(study, f"{kind}-test", study.rows(kind, "test"))
        stages[kind] = {"data": _rows_file(study, f"{kind}-replay", rows + kept), "test_data": test}
        kept += rows[: round(REPLAY_SHARE * len(rows))]
    options = sequence(study, "replay", SEQUENTIAL["lora"], stages=stages)
    continual(options)
    found = _of_sequence(study, options.output_dir)
    shutil.rmtree(str(options.output_dir))
    return found


def _of_sequence(study: Study, folder: str | None) -> Found:
    """Matrix, marks after every stage, OP and PD of a sequence; with skills who was asked, and the changed answers."""
    path = Path(folder or "")
    record = read_json(path / RECORD_FILE)
    stages = [path / entry["folder"] for entry in record["stages"]]
    tests = [[read_json(each) for each in sorted((stage / EVALUATION_FOLDER).glob("*.json"))] for stage in stages]
    trained = [read_json(stage / "run.json") for stage in stages]
    last = record["results"][-1]
    after = [["".join("01"[row["correct"]] for row in test["samples"]) for test in row] for row in tests]
    found = {
        "marks": dict(zip(study.order, after[-1], strict=True)),
        "stages": after,
        "op": last["overall_performance"],
        "pd": last["performance_drop"],
        "steps": [each["steps"] for each in trained],
        "trainable_parameters": trained[0]["trainable_parameters"],
        "seconds_training": [round(each["seconds"], 1) for each in trained],
    }
    for name in ("asked", "changed"):
        if name in last:
            found[name] = [row[name] for row in record["results"]]
    return found


METHODS: dict[str, Callable[[Study], Found]] = {
    "base": lambda study: on_all_kinds(study, base_model(study)),
    "skills": skills,
    "own": own,
    "from layer 0": own_from(0),
    "from layer 20": own_from(20),
    **{method: merged(method) for method in MERGES},
    "arrow": arrow,
    "converted": converted,
    "text classifier": text_classifier,
    "joint": joint,
    "replay": replay,
    "lora": sequential("lora"),
    "2468": sequential("2468"),
}
