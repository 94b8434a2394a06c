"""The loss and the perplexity of free text: how well a loaded model predicts the outputs of examples."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from mola.checkpoints.skills_folder import BASE
from mola.data.encode import data_fingerprint, encode_untruncated
from mola.data.examples import trained_bytes
from mola.data.templates import Template, get_template
from mola.data.tokenized import IGNORED
from mola.errors import NotFiniteError
from mola.evaluation.core import process_batches, why_one_by_one
from mola.evaluation.scoring import summarize_losses
from mola.evaluation.skills import SkillPrompts, asking, count_asked, decides, skills_asked
from mola.files.environment import machine_description, software_versions
from mola.generation import predicting
from mola.generation.likelihood import label_losses
from mola.options.fields import check_positive

logger = logging.getLogger(__name__)


@dataclass
class LossResult:
    r"""Result of an evaluation on free text; the fields are those of the result file.

    With the loss `L_i` of row `i` in nats, summed over its `T_i` trained tokens, and its `B_i` trained bytes:

        loss = \sum_i L_i / \sum_i T_i      perplexity = exp(loss)      loss_per_byte = \sum_i L_i / \sum_i B_i

    Attributes:
        loss: nats per trained token.
        perplexity: e to the power of `loss`; infinite above 709 nats, which is null in the result file.
        loss_per_byte: nats per UTF-8 byte of the trained text, which different tokenizers share; None if there are no
            bytes.
        interval_95: 95 % interval of `loss` for other rows, see `mola.evaluation.scoring.loss_interval`; None for a
            single row.
        tokens: trained tokens. The token that ends an output is one of them.
        bytes: bytes of the trained text. The token that ends an output has none.
        total: number of rows.
        samples: `id`, `loss` (sum, in nats), `tokens` and `bytes` of each row, in the order of the data; of a
            skills folder also `asked`, the name of the skill that is asked, or "base".
        settings: template and batch size (1 if batches would change results).
        versions: of mola, torch, transformers, peft and Python.
        data_fingerprint: SHA-256 of the examples, computed as for a training run's `run.json`.
        seconds: wall time of all rows, excluding loading; includes the time before a resume.
        machine: cpu, gpu, threads.
        asked: name of a skill, or "base" -> number of rows that it answered; None without skills, and then it is no
            field of the file.
    """

    loss: float
    perplexity: float
    loss_per_byte: float | None
    interval_95: list[float] | None
    tokens: int
    bytes: int
    total: int
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]
    data_fingerprint: str
    seconds: float
    machine: dict[str, Any]
    asked: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Content of the result file."""
        content = asdict(self) | {"perplexity": self.perplexity if math.isfinite(self.perplexity) else None}
        return {name: value for name, value in content.items() if name != "asked" or value is not None}


def evaluate_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    template: str | Template = "alpaca",
    skill_prompts: Mapping[str, SkillPrompts] | None = None,
    add_eos_token: bool = True,
    batch_size: int = 8,
    finished_records: Iterable[Mapping[str, Any]] = (),
    on_batch: Callable[[list[dict[str, Any]]], None] | None = None,
    show_progress: bool = True,
) -> LossResult:
    """Measure the loss of a loaded model on the examples' outputs; model and tokenizer stay unchanged.

    The tokens are those that a training on the examples would train, and the loss is that of the training without the
    losses of routers.

    In a model with skills the prompt of each row, or its text if it has none, asks the skill that knows it, unless the
    caller names one with `model.skills.use`. A chat asks one skill, by its first question.

    Args:
        model: causal language model, in training or eval mode.
        tokenizer: its tokenizer.
        examples: as `mola.data.examples.load_examples` returns them.
        template: prompt template, or its name.
        skill_prompts: skills whose rows are written otherwise, see `mola.evaluation.skills.skill_prompts`.
        add_eos_token: let the end token after an output count, as in a training with `add_eos_token`. A tokenizer
            without an end token adds none.
        batch_size: rows per batch.
        finished_records: records of an earlier, interrupted evaluation, in the form in which `on_batch` gets them.
        on_batch: called after every batch with its records `{"index", "seconds", "sample"}`, see `evaluate_examples`;
            a sample has the `id`, `loss` and `tokens` of an encoded row. Some chats are encoded as several.
        show_progress: show a progress bar on stderr.

    Returns:
        The result.

    Raises:
        MolaError: wrong arguments or examples; a row too long for the model.
        NotFiniteError: the loss of a row is not a finite number.
    """
    check_positive(batch_size=batch_size)
    layout = template if isinstance(template, Template) else get_template(template, tokenizer)
    limit = predicting.positions_left(model)
    dataset = encode_untruncated(examples, tokenizer, layout, limit, add_eos_token)
    asked, skills = None, None
    if decides(model):
        asked = _skills_of_examples(model, tokenizer, dataset)
        dataset = _written_by_skill(examples, tokenizer, dataset, asked, skill_prompts or {}, limit)
        skills = [asked[owner] for owner in dataset["example"]]
    owners, lengths = list(dataset["example"]), list(dataset["length"])
    if batch_size > 1 and (reason := why_one_by_one(model, max(lengths))) is not None:
        logger.warning("Rows are processed one at a time: %s.", reason)
        batch_size = 1

    def measure(indices: list[int]) -> list[dict[str, Any]]:
        rows = dataset[indices]
        with asking(model, skills, indices):
            losses = label_losses(model, tokenizer, rows["input_ids"], rows["labels"])
        return [_sample(examples[owners[index]], *row) for index, row in zip(indices, losses, strict=True)]

    title = "Loss, batches" if show_progress else None
    records = process_batches(model, measure, lengths, batch_size, finished_records, on_batch, title, skills)
    settings = {"template": layout.name, "batch_size": batch_size}
    samples = _sum_by_example(examples, owners, [record["sample"] for record in records])
    if asked is not None:
        samples = [sample | {"asked": name or BASE} for sample, name in zip(samples, asked, strict=True)]
    return LossResult(
        **summarize_losses(samples),
        samples=samples,
        settings=settings,
        versions=software_versions(),
        data_fingerprint=data_fingerprint(examples),
        seconds=sum(record["seconds"] for record in records),
        machine=machine_description(predicting.device_of(model)),
        asked=None if asked is None else count_asked(asked),
    )


def _skills_of_examples(model: Any, tokenizer: PreTrainedTokenizerBase, dataset: datasets.Dataset) -> list[str | None]:
    """The skill that each example asks: by the tokens before its first answer, or by its text if it has no prompt."""
    special, prompts = set(tokenizer.all_special_ids), dict[int, list[int]]()
    for owner, ids, labels in zip(dataset["example"], dataset["input_ids"], dataset["labels"], strict=True):
        prompt = ids[: next(place for place, label in enumerate(labels) if label != IGNORED)]
        prompts.setdefault(owner, prompt if set(prompt) - special else ids)
    return skills_asked(model, [prompts[index] for index in range(len(prompts))])


def _written_by_skill(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    asked: Sequence[str | None],
    skill_prompts: Mapping[str, SkillPrompts],
    limit: int | None,
) -> datasets.Dataset:
    """The rows, those of skills with prompts of their own encoded anew; an example may have several rows."""
    owned: dict[str, list[int]] = {}
    for index, name in enumerate(asked):
        if name in skill_prompts:
            owned.setdefault(str(name), []).append(index)
    others = [row for row, owner in enumerate(dataset["example"]) if asked[owner] not in owned]
    parts = [dataset.select(others)]
    for name, indices in owned.items():
        own = skill_prompts[name]
        part = encode_untruncated(
            [examples[index] for index in indices], tokenizer, own.template, limit, own.add_eos_token
        )
        owners = [indices[owner] for owner in part["example"]]
        parts.append(part.remove_columns("example").add_column("example", owners))
    return datasets.concatenate_datasets(parts)


def _sample(example: Mapping[str, Any], loss: float, tokens: int) -> dict[str, Any]:
    """The loss of one encoded sample; a chat may have several."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the loss of sample {example['id']!r} is {loss}. Pass --dtype float32 or bfloat16, and check that the "
            "weights of `base_model` are finite."
        )
    return {"id": example["id"], "loss": loss, "tokens": tokens}


def _sum_by_example(
    examples: Sequence[Mapping[str, Any]], owners: Sequence[int], parts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    samples = [{"id": each["id"], "loss": 0.0, "tokens": 0, "bytes": trained_bytes(each)} for each in examples]
    for owner, part in zip(owners, parts, strict=True):
        samples[owner]["loss"] += part["loss"]
        samples[owner]["tokens"] += part["tokens"]
    return samples
