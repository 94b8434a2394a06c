"""The model card of a run, README.md in its folder, with a picture of the loss.

A card that was changed by hand, or that mola did not write, is never replaced, see `mola.files.digests`.
"""

import importlib
import io
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mola.data.read import is_hub_name
from mola.errors import MolaError
from mola.files.atomic import atomic_write_bytes, atomic_write_text
from mola.files.digests import WEIGHTS_FILE, add_digest_line, is_own_file
from mola.files.reading import read_json_object
from mola.reporting import CARD_FILE, PLOT_FILE
from mola.reporting.adapter_weights import layers_of, layers_table, pattern_sentence, target_names, tensor_shapes
from mola.reporting.formatting import LOSS_NAMES, markdown_table
from mola.reporting.load_run import read_losses, step_of_weights
from mola.reporting.run_summary import data_table, launcher_sentence

logger = logging.getLogger(__name__)

_INSTALL = """\
Install mola (distribution `mola-peft`) from its repository. Importing mola registers the method with PEFT.

"""
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "weight_decay",
    "dtype",
    "cutoff_len",
    "template",
    "train_on_inputs",
    "seed",
)


def write_model_card(
    folder: str | Path, results: Sequence[str | Path] = (), repository: str | None = None
) -> Path | None:
    """Rewrite the card of a finished run, for example with the accuracy that `mola evaluate` measured.

    Args:
        folder: the run folder.
        results: result files of `mola evaluate`.
        repository: name of the repository on the Hub, `owner/name`, that the code on the card loads; by default the
            one that the run was uploaded to, else the folder.

    Returns:
        The card, or None if an existing card was written or changed by hand; that card is kept.

    Raises:
        MolaError: the folder holds no finished run, or a file is not a result of `mola evaluate`.
    """
    record = read_json_object(Path(folder) / "run.json")
    if record.get("status") not in ("finished", "interrupted"):
        raise MolaError(f"`folder` must hold a finished run: {str(folder)!r} has no run.json of one.")
    evaluations = []
    for result in results:
        content = read_json_object(result)
        measured = content.keys() & {"accuracy", "perplexity"}
        if not measured or not {"total", "interval_95", "settings"} <= content.keys():
            raise MolaError(f"`results` must be result files of `mola evaluate`: {str(result)!r} is none.")
        evaluations.append(content)
    return write_card(Path(folder), record | ({"repository": repository} if repository else {}), evaluations)


def write_card(folder: Path, record: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]] = ()) -> Path | None:
    """Write the card and the picture of the loss; returns the card, or None if an existing card is kept.

    Args:
        folder: the run folder.
        record: the content of its `run.json`.
        evaluations: the contents of result files of `mola evaluate`.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_own_file(path):
        logger.warning(
            "%s was not written by mola, or was changed since. It is kept, and no model card is written.", path
        )
        return None
    has_plot = plot_losses(read_losses(folder / "metrics.jsonl", step_of_weights(record)), folder / PLOT_FILE)
    if not has_plot:
        (folder / PLOT_FILE).unlink(missing_ok=True)
    return atomic_write_text(path, add_digest_line(render_card(folder, record, evaluations, has_plot=has_plot)))


def render_card(
    folder: Path, record: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]] = (), *, has_plot: bool = False
) -> str:
    """The card's text. Arguments: see `write_card`; `has_plot` says whether there is a picture of the loss."""
    settings = record["settings"]
    config = read_json_object(folder / "adapter_config.json")
    is_mixture = config.get("peft_type") == "MOLA"
    place = record.get("repository") or str(folder)
    no_plot = (
        "No picture: matplotlib (`pip install 'mola-peft[plot]'`) was not installed, or nothing was logged. "
        "The curve is in `metrics.jsonl`."
    )
    sections = [
        f"# {place.rstrip('/').rpartition('/')[2]}",
        _introduction_section(config, settings, record),
        _usage_section(place, settings, settings.get("hub_revision") if record.get("repository") else None, is_mixture),
        "## Experts\n\n" + _experts_section(config, folder),
        "## Training\n\n" + _training_section(record),
        "## Data\n\n" + _data_section(record),
        "## Results\n\n" + _results_section(record, evaluations),
        "## Loss\n\n" + (f"![loss by step]({PLOT_FILE})" if has_plot else no_plot),
        "## Versions\n\n" + markdown_table(("software", "version"), record["versions"].items()),
    ]
    return str(ModelCard(f"---\n{_front_matter(record, is_mixture).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _front_matter(record: Mapping[str, Any], is_mixture: bool) -> ModelCardData:
    """Metadata for the Hub. Names of local folders are left out, since the Hub rejects them. Users add a licence."""
    base, data = record["settings"]["base_model"], record["settings"]["data"]
    return ModelCardData(
        base_model=base if is_hub_name(base) and not Path(base).exists() else None,
        datasets=[data.partition(":")[0]] if is_hub_name(data) and not Path(data).exists() else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["mola", *(["mixture-of-experts"] if is_mixture else []), "lora", "peft"],
    )


def _introduction_section(config: Mapping[str, Any], settings: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    kind = config.get("peft_type")
    method = "A mixture of LoRA experts" if kind == "MOLA" else f"A {kind} adapter"
    start = f", trained on from the adapter `{settings['adapter']}`" if settings.get("adapter") else ""
    size = f"{record['trainable_parameters']:,} trainable parameters"
    return f"{method} for `{settings['base_model']}`{start}. It has {size}."


def _usage_section(place: str, settings: Mapping[str, Any], revision: str | None, needs_mola: bool) -> str:
    trust = {"trust_remote_code": True} if settings.get("trust_remote_code") else {}
    gguf = {"gguf_file": settings["gguf_file"]} if settings.get("gguf_file") else {}
    own = {"revision": revision} if revision else {}
    base, adapter = _python_arguments(settings["base_model"], gguf | trust), _python_arguments(place, own)
    # The auto class of PEFT loads the base model, for which it has no option `gguf_file`.
    with_auto_class = f"""\
```python
import mola
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({_python_arguments(place, own | trust)})
tokenizer = AutoTokenizer.from_pretrained({_python_arguments(place, own | trust)})
```

With a loaded base model:

"""
    text = f"""\
## Use

{_INSTALL}{"" if gguf else with_auto_class}```python
import mola
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {adapter})
```"""
    return text if needs_mola else text.replace(_INSTALL, "").replace("import mola\n", "")


def _python_arguments(name: str, options: Mapping[str, Any]) -> str:
    """Arguments of `from_pretrained` as Python code; values are texts or True."""
    keywords = [
        f"{key}={value if value is True else json.dumps(value, ensure_ascii=False)}" for key, value in options.items()
    ]
    return ", ".join([json.dumps(name, ensure_ascii=False), *keywords])


def _experts_section(config: Mapping[str, Any], folder: Path) -> str:
    if config.get("peft_type") != "MOLA":
        return f"None: the adapter is of type {config.get('peft_type')}."
    table = layers_table(layers_of(config, tensor_shapes(folder / WEIGHTS_FILE)))
    modules = ", ".join(f"`{name}`" for name in target_names(config))
    return f"{markdown_table(table.head, table.rows)}\n\nAdapted modules: {modules}.{pattern_sentence(config)}"


def _training_section(record: Mapping[str, Any]) -> str:
    settings = {name: record["settings"].get(name) for name in _SETTINGS}
    settings["template"] = record.get("template") or settings["template"]  # a task's template is not an option
    values = {
        **record["adapter_settings"],
        **settings,
        "effective_batch_size": record["effective_batch_size"],
        "processes": record["processes"] if record.get("processes", 1) > 1 else None,
        "quantization": record.get("quantization"),
    }
    table = markdown_table(("setting", "value"), ((name, value) for name, value in values.items() if value is not None))
    word, *rest = record["command"]
    if Path(word).name == "mola":
        command = f"{launcher_sentence(record)}\n\n```bash\n{shlex.join(['mola', *rest])}\n```".lstrip()
    else:
        command = f"Started from the program `{Path(word).name}`; every setting is in `run.json`."
    processor = record["machine"].get("gpu") or record["machine"]["cpu"]
    length = f"{record['steps']} steps, {record['status']}, in {record['seconds']:.0f} s on {processor}."
    if (saved_step := step_of_weights(record)) not in (None, record["steps"]):
        length += f" The weights are those of step {saved_step}, which had the best evaluation loss."
    return f"{table}\n\n{length}\n\n{command}"


def _data_section(record: Mapping[str, Any]) -> str:
    table, task = data_table(record), record["settings"].get("task")
    start = f"`{record['settings']['data']}`{f', task `{task}`' if task else ''}."
    return f"{start}\n\n{markdown_table(table.head, table.rows)}"


def _results_section(record: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (label, f"{record['metrics'][name]:.4f}", "") for name, label in LOSS_NAMES.items() if name in record["metrics"]
    ]
    for result in evaluations:
        settings, interval = result["settings"], result["interval_95"]
        adapter = settings.get("adapter")
        of = f"with `{str(adapter).rstrip('/').rpartition('/')[2]}`" if adapter else "base model alone"
        samples = f"{result['total']} samples of `{settings.get('data')}`"
        if "accuracy" in result:
            note = f"{interval[0]:.1%} to {interval[1]:.1%}, scoring {settings.get('scoring')}"
            name = ", ".join(part for part in ("accuracy", of, settings.get("task"), samples) if part)
            rows.append((name, f"{result['accuracy']:.1%}", note))
        else:
            note = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
            rows.append((f"loss per token (nats), {of}, {samples}", f"{result['loss']:.4f}", note))
    table = markdown_table(("metric", "value", "95 % interval"), rows)
    return table if evaluations else f"{table}\n\nAccuracy was not measured in training."


# ---------------------------------------------------------------------- the picture of the loss


def plot_losses(curves: dict[str, list[tuple[int, float]]], target: Path) -> bool:
    """Draw loss curves into a PNG file; returns False without a curve or without matplotlib."""
    if not curves or why_no_matplotlib() is not None:
        return False
    from matplotlib.figure import Figure  # pyplot would choose a window system for the whole process

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for label, curve in curves.items():
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, marker="o" if len(curve) < 30 else None, markersize=3, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    atomic_write_bytes(target, picture.getvalue())
    return True


def why_no_matplotlib() -> str | None:
    """None if matplotlib (extra `plot`) can be used, else the reason why it cannot."""
    try:
        importlib.import_module("matplotlib.figure")
    except (ImportError, AttributeError) as error:  # AttributeError: it was built for a different version of numpy
        if error.name != "matplotlib":  # installed, but broken
            logger.warning("matplotlib cannot be used: %s", error)
        return str(error)
    return None
