"""The adapter that a script is given: mola's own, checked against the lists, or the research code's, converted once."""

import logging
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mola.architecture.allocation import effective_top_k
from mola.architecture.notation import pattern_with, resolve_per_layer
from mola.architecture.targets import linear_shapes
from mola.checkpoints.formats import foreign_format
from mola.errors import MolaError
from mola.exporting.convert import ConvertOptions, convert
from mola.files.atomic import atomic_write_json
from mola.files.digests import CONFIG_FILE, WEIGHTS_FILES, file_sha256
from mola.files.reading import read_json_object
from mola.models.adapters import check_adapter
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.options.fields import names_between_commas

_RECORD = "conversion.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lists:
    """What the research code wants repeated for every adapter; None where the flag was not given."""

    number_experts: str | None = None  # experts per layer, in any notation
    top_k: str | None = None  # experts used per token, in any notation
    lora_r: str | None = None  # ranks, in any notation
    lora_alpha: float | None = None  # numerator of the scale
    lora_target_modules: str | None = None  # names between commas


def _plain(numbers: str | None) -> str | None:
    """A list without the brackets in which the research code lets it stand."""
    if numbers is None:
        return None
    plain = numbers.strip().strip("()[]")
    return f"{plain}," if plain != numbers.strip() and plain.isdecimal() else plain  # one number: not its digits


def _names(text: str | None) -> str | None:
    """Names between commas, without the brackets and quotes of a list; another text, such as a pattern, as it is."""
    found = re.fullmatch(r"\s*(?:\[(.*)\]|\((.*)\))\s*", text or "")
    if found is None:
        return text
    names = [name.strip().strip("'\"") for name in (found[1] or found[2] or "").split(",")]
    return ",".join(names) if all(re.fullmatch(r"[\w.-]+", name) for name in names) else text


def lists_of(options: Any) -> Lists:
    """What the flags of a script say about its adapter."""
    given = {item.name: getattr(options, item.name, None) for item in fields(Lists)}
    given |= {name: _plain(given[name]) for name in ("number_experts", "top_k", "lora_r")}
    return Lists(**given | {"lora_target_modules": _names(given["lora_target_modules"])})


def process_count() -> int:
    """Processes of this run, as their launcher says in `WORLD_SIZE`; 1 without one. Other text is refused."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise MolaError(f"`WORLD_SIZE` must be the number of processes: got {text!r}. Unset it to run one process.")
    return int(text)


def usable_adapter(folder: str, base_model: str, lists: Lists, trust_remote_code: bool = False) -> str:
    """Folder of an adapter of mola, which may be `folder` itself.

    An adapter of the research code is converted to `<folder>.mola`, once: as long as the source and
    `top_k` stay the same the folder is used again. Its files do not hold `top_k`, so `lists` must, which are
    what the command line says about the adapter.

    Raises:
        MolaError: no adapter there, it is not what the lists say, or they lack the `top_k` that it needs.
    """
    published = read_json_object(Path(folder) / "adapter_config.json")
    if foreign_format(published) == "published":
        folder = _converted(folder, base_model, lists.top_k, trust_remote_code)
    settings = check_adapter(folder)
    if settings["peft_type"] == "MOLA":
        _check_lists(folder, settings, base_model, lists, trust_remote_code)
    else:
        _refuse_lists(folder, settings["peft_type"], lists)
    return folder


def _converted(source: str, base_model: str, top_k: str | None, trust_remote_code: bool) -> str:
    if top_k is None:
        raise MolaError(
            f"`top_k` must be given for an adapter of the research code: the files in {source!r} do not hold it, and a "
            "wrong one gives other outputs without an error. Pass --top_k with the value of its training (2 was the "
            "default)."
        )
    target = Path(f"{Path(source).resolve()}.mola")
    num_layers = count_decoder_layers(model_on_meta(base_model, trust_remote_code), base_model)
    record = {"source": _fingerprint(Path(source)), "top_k": resolve_per_layer(top_k, num_layers, "top_k")}
    if target.exists():
        if _is_the_same(read_json_object(target / _RECORD), record, target):
            return str(target)
        raise MolaError(
            f"`{target}` was not converted from {source!r} as it is now with `top_k` {top_k}. Remove that folder, or "
            "convert by hand with `mola convert` and pass its output."
        )
    command = (
        f"`mola convert {shlex.quote(source)} --from published --base_model {shlex.quote(base_model)} --top_k {top_k} "
        "--output DIR`"
    )
    if process_count() > 1:
        raise MolaError(
            f"{source!r} is an adapter of the research code, which one process has to convert before several train: "
            f"run {command} and pass DIR."
        )
    if not os.access(target.parent, os.W_OK):
        raise MolaError(
            f"{source!r} is an adapter of the research code, and nothing can be written beside it: run {command} and "
            "pass DIR."
        )
    report = convert(
        ConvertOptions(
            source=[source],
            output=str(target),
            source_format="published",
            base_model=base_model,
            top_k=top_k,
            trust_remote_code=trust_remote_code,
        )
    )
    try:
        atomic_write_json(target / _RECORD, record)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    logger.warning("Converted the adapter of the research code:\n%s", report)
    return str(target)


def _is_the_same(before: Mapping[str, Any], now: Mapping[str, Any], target: Path) -> bool:
    """Whether a conversion is that of these files and numbers: "2" and "1,2,2,2" may be the same adapter."""
    counts, known = read_json_object(target / "adapter_config.json").get("num_experts"), before.get("top_k")
    if before.get("source") != now["source"] or not isinstance(counts, list) or not isinstance(known, list):
        return False
    return effective_top_k(counts, known) == effective_top_k(counts, now["top_k"])


def _fingerprint(folder: Path) -> dict[str, str]:
    files = [folder / name for name in (CONFIG_FILE, *WEIGHTS_FILES)]
    return {file.name: file_sha256(file) for file in files if file.is_file()}


def _refuse_lists(folder: str, peft_type: str, lists: Lists) -> None:
    """Only an adapter of mola has what the lists could be compared with."""
    given = {name: value for name, value in asdict(lists).items() if value is not None}
    if given:
        flags = ", ".join(f"`{name}` ({value})" for name, value in given.items())
        raise MolaError(
            f"{flags} can be checked for an adapter of mola only: {folder!r} is of type {peft_type}. Leave "
            f"{'it' if len(given) == 1 else 'them'} out: the adapter brings its own settings."
        )


def _resolved(notation: str, num_layers: int, flag: str, name: str) -> list[int]:
    """One integer per layer; messages name the flag, which has another name than the setting."""
    try:
        return resolve_per_layer(notation, num_layers, name)
    except MolaError as error:
        raise MolaError(str(error).replace(f"`{name}`", f"`{flag}`")) from error


def _check_lists(
    folder: str, settings: Mapping[str, Any], base_model: str, lists: Lists, trust_remote_code: bool
) -> None:
    """Refuse a flag that says something else than the adapter's own file, which is what counts."""
    if lists == Lists():
        return
    model = model_on_meta(base_model, trust_remote_code)
    num_layers = count_decoder_layers(model, base_model)
    saved: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if missing := [name for name in ("num_experts", "r", "top_k", "lora_alpha") if settings.get(name) is None]:
        raise MolaError(f"adapter_config.json in {folder!r} has no {', '.join(missing)}: it is damaged. Restore it.")
    for flag, name in (("number_experts", "num_experts"), ("lora_r", "r"), ("top_k", "top_k")):
        saved[flag] = resolve_per_layer(settings[name], num_layers, name)
        if getattr(lists, flag) is not None:
            given[flag] = _resolved(getattr(lists, flag), num_layers, flag, name)
    for lengths in (saved, given):
        if "top_k" in lengths:
            lengths["top_k"] = effective_top_k(saved["number_experts"], lengths["top_k"])
    if lists.number_experts is not None and (pattern := pattern_with(lists.number_experts, None)):
        given["number_experts"].append(dict(pattern))
        saved["number_experts"] = [*saved["number_experts"], settings.get("num_experts_pattern") or {}]
    if lists.lora_alpha is not None:
        given["lora_alpha"], saved["lora_alpha"] = float(lists.lora_alpha), float(settings["lora_alpha"])
    if lists.lora_target_modules is not None:
        wanted = names_between_commas(lists.lora_target_modules, "lora_target_modules")
        targets = settings.get("target_modules")
        if wanted is not None and _same_linears(model, wanted, targets):
            wanted = targets  # "all-linear" is saved as whole names
        given["lora_target_modules"] = sorted(wanted) if isinstance(wanted, list) else wanted
        saved["lora_target_modules"] = sorted(targets) if isinstance(targets, list) else targets
    for flag, value in given.items():
        if value != saved[flag]:
            raise MolaError(
                f"`{flag}` must be what the adapter was made with: got {_text(value)}, {folder!r} has "
                f"{_text(saved[flag])}. Leave the flag out: the adapter says it itself."
            )


def _same_linears(model: Any, one: Any, other: Any) -> bool:
    try:
        first, second = ({each.name for each in linear_shapes(model, names)} for names in (one, other))
    except MolaError:  # names that are not there: the comparison of texts says it better
        return False
    return first == second


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
