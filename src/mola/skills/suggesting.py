"""Which layer's input tells the data of skills apart.

One pass of the base model per prompt measures all layers. Every second prompt of each source is held out, and the
decision is made from the others. A prompt is right if its own skill is asked, so a prompt that goes to the base model
is wrong. See `choose_layer` for the suggestion.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.skills_folder import read_skills
from mola.data.read import check_split
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.environment import software_versions
from mola.generation.predicting import encode_prompts
from mola.models.base_model import max_positions, weights_identity
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.skills import content_finder
from mola.options.fields import check_results
from mola.skills.measuring import features_of_layers
from mola.skills.options import SuggestOptions, split_pairs
from mola.skills.prompts import DataSource, read_prompts
from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.decision import Decider, suggest_threshold
from mola.tuner.skills.general_text import general_texts
from mola.tuner.skills.lower_layers import settled_layer
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics

ERRORS = 2  # standard errors by which a layer must be better than the default: the best of many is high by chance
_FEWEST = 4  # prompts of each source


@dataclass(frozen=True)
class LayerResult:
    """How a decision at the input of one layer does on held-out prompts.

    Attributes:
        layer: 0 = nearest the input.
        right: share of the prompts that ask their own skill.
        gain: `right`, less that of the default layer.
        standard_error: of `gain`, because other prompts would give another one.
        to_base: share of the prompts that go to the base model.
        threshold: the threshold that the reject rate sets, from prompts of the fitted half.
    """

    layer: int
    right: float
    gain: float
    standard_error: float
    to_base: float
    threshold: float


@dataclass(frozen=True)
class SuggestResult:
    """The suggestion.

    Attributes:
        layer: the suggested layer.
        default_layer: the layer of a new folder if none is given.
        layers: the result of every layer.
        prompts: name of a skill -> number of held-out prompts.
        settings: the options.
    """

    layer: int
    default_layer: int
    layers: list[LayerResult]
    prompts: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "versions": software_versions()}


def suggest(options: SuggestOptions) -> SuggestResult:
    """Compare decisions at the inputs of all layers.

    Args:
        options: see `SuggestOptions`.

    Returns:
        The result; also written to `options.output`, if that is given.

    Raises:
        MolaError: data are unreadable or too few, or the base model of a skills folder is another one.
    """
    check_results(options)
    sources, adapters = split_pairs("data", options.data, "NAME=DATA"), _adapters(options)
    if len(sources) < 2:
        raise MolaError("`data` must have the prompts of at least two skills, which a layer then tells apart.")
    config, tokenizer = check_model(options), tokenizer_for(options)
    prompts = {}
    for name, path in sources.items():
        check_split("split", options.split, SuggestOptions.split, path)
        source = DataSource(path, options.task, options.split, options.template, adapter=adapters.get(name))
        prompts[name] = read_prompts(source, tokenizer, options.limit, max_positions(config)).ids
        if len(prompts[name]) < _FEWEST:
            raise MolaError(f"`data` must have at least {_FEWEST} prompts each: {path!r} has {len(prompts[name])}.")
    model = model_for(options, None)
    finder = content_finder(tokenizer, list(adapters.values()))
    features = {name: features_of_layers(model, finder, ids) for name, ids in prompts.items()}
    general = features_of_layers(model, ContentFinder(tokenizer), encode_prompts(tokenizer, list(general_texts())))
    decided = [
        _decide(text, {name: each[layer] for name, each in features.items()}, options.reject_rate)
        for layer, text in enumerate(general)
    ]
    held_out = {name: len(ids) // 2 for name, ids in prompts.items()}
    owners = [name for name, number in held_out.items() for _ in range(number)]
    rows = [[asked == owner for asked, owner in zip(names, owners, strict=True)] for names, _ in decided]
    right, default = torch.tensor(rows, dtype=torch.float64), settled_layer(None, len(decided))
    gains, errors = _gains(right, default)
    layers = [
        LayerResult(layer, share, gain, error, names.count(None) / len(owners), threshold)
        for layer, (share, gain, error, (names, threshold)) in enumerate(
            zip(right.mean(1).tolist(), gains.tolist(), errors.tolist(), decided, strict=True)
        )
    ]
    result = SuggestResult(choose_layer(right, default), default, layers, held_out, asdict(options))
    if options.output is not None:
        atomic_write_json(options.output, result.to_dict())
    return result


def _adapters(options: SuggestOptions) -> dict[str, Path]:
    """Name -> LoRA of the skills in `folder`, if it is a skills folder."""
    if not is_skills_folder(path := os.path.expanduser(options.folder)):
        return {}
    folder = read_skills(path)
    folder.check_base(options.base_model, weights_identity(options.base_model))
    return {name: folder.adapter(name) for name in folder.names}


def _decide(
    general: list[torch.Tensor], features: dict[str, list[torch.Tensor]], reject_rate: float
) -> tuple[list[str | None], float]:
    """Whom held-out prompts ask at one layer, and the threshold; rows 1, 3, 5, ... of the features are held out."""
    base = GeneralStatistics.of_features(general)
    skills = {name: SkillStatistics.of_features(each[::2]) for name, each in features.items()}
    threshold = suggest_threshold(base, skills, reject_rate)
    held_out = [prompt for each in features.values() for prompt in each[1::2]]
    return Decider(base, skills, threshold).decide_features(held_out).names, threshold


def choose_layer(right: torch.Tensor, default: int) -> int:
    """The default layer, unless others are better by more than two standard errors of the difference.

    Then it is the best of these; of equal ones the lowest.

    Args:
        right: 1 where a prompt asks its own skill, else 0, `(layers, prompts)`.
        default: the default layer.
    """
    gains, errors = _gains(right, default)
    gains[gains <= ERRORS * errors] = 0
    return int(gains.argmax()) if gains.any() else default


def _gains(right: torch.Tensor, default: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each layer the share of right prompts less that of the default layer, and the standard error of this."""
    differences = right - right[default]
    return differences.mean(1), differences.std(1) / right.shape[1] ** 0.5
