"""Makes plain LoRAs of one base model skills of a folder.

The prompts of each skill go through the lower layers of the base model once. The folder keeps a copy of the LoRA and
statistics of its prompts. LoRAs and statistics of other skills stay as they are.
"""

from __future__ import annotations

import copy
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.plain_lora import check_plain_lora, describe_lora
from mola.checkpoints.recorded_base import lasting_name
from mola.checkpoints.skills_folder import (
    SkillEntry,
    SkillsFolder,
    add_entry,
    check_layer,
    check_name_is_free,
    check_skill_name,
    copy_lora,
    locked,
    lora_sha256,
    read_skills,
    write_skills,
)
from mola.data.read import check_split
from mola.files.atomic import check_new_folder
from mola.models.adapters import check_lora, warn_other_base
from mola.models.base_model import max_positions, weights_identity
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.meta import model_on_meta
from mola.models.prompts import hand_on_prompts
from mola.models.skills import content_finder
from mola.skills.deciding import describe_moves, with_threshold
from mola.skills.measuring import features_at, measure_general_text
from mola.skills.options import REJECT_RATE, AddOptions
from mola.skills.prompts import DataSource, read_prompts, recorded_source
from mola.tuner.skills.loras import LoraStore
from mola.tuner.skills.lower_layers import decoder_layers, settled_layer
from mola.tuner.skills.statistics import SkillStatistics


@dataclass(frozen=True)
class AddResult:
    """What adding skills did.

    Attributes:
        folder: the folder as it is now.
        added: names of the skills that were added or replaced.
        moved: what became of earlier decisions on held-out prompts of the other skills; one line per kind of move.
        too_long: name of a skill -> number of its prompts that were left out, because the model cannot read them.
    """

    folder: SkillsFolder
    added: list[str]
    moved: list[str] = field(default_factory=list)
    too_long: dict[str, int] = field(default_factory=dict)


def commands_of_folder(folder: str) -> list[str]:
    """The commands that test and serve a skills folder."""
    quoted = shlex.quote(folder)
    return [f"mola skills test {quoted} --data NAME=TEST_DATA ...", f"mola serve {quoted}"]


def add(options: AddOptions, model: Any = None) -> AddResult:
    """Add skills to a folder, which is created with the first ones.

    Args:
        options: see `AddOptions`.
        model: the base model if it is loaded, in eval mode; nothing may be adapted below the decision's layer.

    Raises:
        MolaError: an adapter cannot be a skill of this folder, data are missing, or the base model is a different one.
            All of this is found before the base model is loaded.
    """
    path, adapters = Path(options.folder), {name: Path(source) for name, source in options.sources().items()}
    with ExitStack() as stack:
        if is_skills_folder(path):
            stack.enter_context(locked(path))
            before = read_skills(path)
        else:
            before = None
            path = check_new_folder("folder", path)
        config = check_model(options)
        on_meta = model_on_meta(options.base_model, options.trust_remote_code, options.gguf_file, config=config)
        folder = _settled(options, before, path, len(decoder_layers(on_meta)))
        first_layers = {name: check_adapter(folder, name, each, options, on_meta) for name, each in adapters.items()}
        tokenizer = tokenizer_for(options)
        prompts = {
            name: read_prompts(source, tokenizer, options.limit, max_positions(config))
            for name, source in _sources(options).items()
        }
        model = model_for(options, None) if model is None else model
        if before is None:
            folder = replace(folder, general=measure_general_text(model, folder.layer, tokenizer).tensors())
        for name, adapter in adapters.items():
            finder = content_finder(tokenizer, [adapter])
            features = features_at(model, folder.layer, finder, prompts[name].ids)
            statistics = SkillStatistics.of_features(features).tensors()
            entry = SkillEntry(lora_sha256(adapter), "", first_layers[name], len(features))
            folder = add_entry(folder, name, entry, statistics)
        folder = with_threshold(folder)
        write_skills(folder, adapters, copy_skill)
    too_long = {name: each.too_long for name, each in prompts.items() if each.too_long}
    return AddResult(folder, list(adapters), describe_moves(before, folder, set(adapters)), too_long)


def _settled(options: AddOptions, before: SkillsFolder | None, path: Path, num_layers: int) -> SkillsFolder:
    """The folder before the new skills, with the settings that are given."""
    base_model, digest = lasting_name(str(options.base_model)), weights_identity(options.base_model)
    if before is None:
        layer = settled_layer(options.layer, num_layers)
        before = SkillsFolder(path, base_model, digest, layer, 0.0, REJECT_RATE, {}, {}, {})
    else:
        before.check_base(base_model, digest)
        check_layer(before, before.layer if options.layer is None else options.layer)
    if options.threshold is not None:
        before = replace(before, threshold=options.threshold, reject_rate=None)
    elif options.reject_rate is not None:
        before = replace(before, reject_rate=options.reject_rate)
    return before


def check_adapter(folder: SkillsFolder, name: str, adapter: Path, options: AddOptions, on_meta: Any) -> int:
    """Check that an adapter can be a skill of a folder; `on_meta` is the base model without weights.

    Returns:
        The lowest layer that it adapts.

    Raises:
        MolaError: the name is wrong or taken, or the adapter is no plain LoRA that fits the base model.
    """
    check_skill_name(name)
    check_name_is_free(folder.path, name, options.overwrite)
    settings = check_plain_lora(adapter)
    warn_other_base(options.base_model, adapter, settings)
    tensors = check_lora(adapter, copy.deepcopy(on_meta))  # which puts the LoRA into the model
    shapes = {key: tuple(each.shape) for key, each in tensors.items()}
    layers = describe_lora(shapes, adapter).layers
    LoraStore(on_meta).check(name, shapes)  # raises for targets that a skill cannot have
    return min(layers, default=folder.layer)


def _sources(options: AddOptions) -> dict[str, DataSource]:
    """The data of each skill."""
    adapters = options.sources()
    if options.data is None:
        return {name: recorded_source(name, adapter, options.template) for name, adapter in adapters.items()}
    sources = {}
    for (name, adapter), path in zip(adapters.items(), options.data, strict=True):
        check_split("split", options.split, AddOptions.split, path)
        sources[name] = DataSource(path, options.task, options.split, options.template, adapter=adapter)
    return sources


def copy_skill(source: Path, target: Path) -> None:
    """Copy a LoRA with the name of its prompt template, and with its chat template if it has its own."""
    copy_lora(source, target)
    hand_on_prompts(source, target)
