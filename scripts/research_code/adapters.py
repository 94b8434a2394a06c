"""Finds the adapter for a script: an adapter of mola, or an adapter of the research code, which is converted once."""

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
from mola.architecture.notation import resolve_per_layer
from mola.architecture.targets import linear_shapes
from mola.checkpoints.adapter_settings import is_published
from mola.errors import MolaError
from mola.exporting.convert import ConvertOptions, convert
from mola.files.atomic import atomic_write_json
from mola.files.digests import CONFIG_FILE, WEIGHTS_FILES, file_sha256
from mola.files.reading import read_json_object
from mola.models.adapters import check_adapter
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.options.fields import split_names

_RECORD = "conversion.json"  # file in the converted folder that names its source files and `top_k`

logger = logging.getLogger("mola.research_code")  # a child of "mola", whose log lines are shown


@dataclass(frozen=True)
class AdapterFlags:
    """The flags that describe an adapter. The research code needs all of them; here each may be None."""

    number_experts: str | None = None
    top_k: str | None = None
    lora_r: str | None = None
    lora_alpha: float | None = None
    lora_target_modules: str | None = None


def adapter_flags(options: Any) -> AdapterFlags:
    """Read the flags of a script that describe its adapter; lists may stand in brackets."""
    given = {item.name: getattr(options, item.name, None) for item in fields(AdapterFlags)}
    for name in ("number_experts", "top_k", "lora_r"):
        given[name] = _without_brackets(given[name])
    given["lora_target_modules"] = _module_names(given["lora_target_modules"])
    return AdapterFlags(**given)


def _without_brackets(numbers: str | None) -> str | None:
    if numbers is None:
        return None
    plain = numbers.strip().strip("()[]")
    is_single_entry = plain != numbers.strip() and plain.isdecimal()
    return f"{plain}," if is_single_entry else plain  # "[16]" is sixteen in every layer, "16" is a pattern 1, 6


def _module_names(text: str | None) -> str | None:
    """`"['q_proj', 'v_proj']"` -> `"q_proj,v_proj"`; text that is no list, such as a pattern, stays as it is."""
    found = re.fullmatch(r"\s*(?:\[(.*)\]|\((.*)\))\s*", text or "")
    if found is None:
        return text
    names = [name.strip().strip("'\"") for name in (found[1] or found[2] or "").split(",")]
    return ",".join(names) if all(re.fullmatch(r"[\w.-]+", name) for name in names) else text


def process_count() -> int:
    """Number of processes of this run, which the launcher puts into `WORLD_SIZE`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def usable_adapter(folder: str, base_model: str, flags: AdapterFlags, trust_remote_code: bool = False) -> str:
    """Return the folder of a mola adapter: `folder` itself, or the converted `<folder>.mola`.

    An adapter of the research code is converted once. The converted folder is used again as long as the source and
    `top_k` stay the same.

    Raises:
        MolaError: there is no adapter, a flag contradicts it, or `top_k` is missing for a conversion.
    """
    config = read_json_object(Path(folder) / CONFIG_FILE)
    if is_published(config):
        folder = _converted(folder, base_model, flags.top_k, trust_remote_code)
    config = check_adapter(folder)
    given = {name: value for name, value in asdict(flags).items() if value is not None}
    if given and config["peft_type"] != "MOLA":
        raise MolaError(
            f"`{next(iter(given))}` describes a mixture, but {folder!r} is of type {config['peft_type']}. Leave the "
            "flag out: the adapter has its own settings."
        )
    if given:
        _check_flags(folder, config, base_model, flags, trust_remote_code)
    return folder


def _converted(source: str, base_model: str, top_k: str | None, trust_remote_code: bool) -> str:
    """Convert an adapter of the research code, or find the earlier conversion."""
    if top_k is None:
        raise MolaError(
            f"`top_k` must be given for an adapter of the research code: the files in {source!r} do not hold it, and a "
            "wrong value gives different outputs without an error. Pass --top_k with the training's value (2 was the "
            "default)."
        )
    target = Path(f"{Path(source).resolve()}.mola")
    num_layers = count_decoder_layers(model_on_meta(base_model, trust_remote_code), base_model)
    files = [Path(source) / name for name in (CONFIG_FILE, *WEIGHTS_FILES)]
    record = {
        "source": {file.name: file_sha256(file) for file in files if file.is_file()},
        "top_k": resolve_per_layer(top_k, num_layers, "top_k"),
    }
    if target.exists():
        if _is_same_conversion(read_json_object(target / _RECORD), record, target):
            return str(target)
        raise MolaError(
            f"`{target}` was not converted from the present files of {source!r} with `top_k` {top_k}. Remove that "
            "folder, or "
            "convert with `mola convert` and pass its output."
        )
    if process_count() > 1:
        raise MolaError(
            f"{source!r} is an adapter of the research code. Convert it before several processes train: run `mola "
            f"convert {shlex.quote(source)} --from published --base_model {shlex.quote(base_model)} --top_k {top_k} "
            "--output DIR` and pass DIR."
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


def _is_same_conversion(before: Mapping[str, Any], now: Mapping[str, Any], target: Path) -> bool:
    """Whether source files and experts used per token are equal; "2" equals "1,2,2,2" if layer 0 has one expert."""
    num_experts, top_k = read_json_object(target / CONFIG_FILE).get("num_experts"), before.get("top_k")
    if before.get("source") != now["source"] or not isinstance(num_experts, list) or not isinstance(top_k, list):
        return False
    return effective_top_k(num_experts, top_k) == effective_top_k(num_experts, now["top_k"])


def _check_flags(
    folder: str, config: Mapping[str, Any], base_model: str, flags: AdapterFlags, trust_remote_code: bool
) -> None:
    """Raise if a flag contradicts the adapter's configuration file."""
    model = model_on_meta(base_model, trust_remote_code)
    num_layers = count_decoder_layers(model, base_model)

    def per_layer(value: Any, name: str) -> list[int]:
        return resolve_per_layer(value, num_layers, name)

    num_experts = per_layer(config["num_experts"], "num_experts")
    compared: dict[str, tuple[Any, Any]] = {}  # flag -> the flag's value, the adapter's value
    if flags.number_experts is not None:
        compared["number_experts"] = per_layer(flags.number_experts, "number_experts"), num_experts
    if flags.lora_r is not None:
        compared["lora_r"] = per_layer(flags.lora_r, "lora_r"), per_layer(config["r"], "r")
    if flags.top_k is not None:
        both = per_layer(flags.top_k, "top_k"), per_layer(config["top_k"], "top_k")
        compared["top_k"] = effective_top_k(num_experts, both[0]), effective_top_k(num_experts, both[1])
    if flags.lora_alpha is not None:
        compared["lora_alpha"] = float(flags.lora_alpha), float(config["lora_alpha"])
    if flags.lora_target_modules is not None:
        names = split_names(flags.lora_target_modules, "lora_target_modules")
        saved = config.get("target_modules")
        compared["lora_target_modules"] = (saved if _same_linears(model, names, saved) else names), saved
    for flag, (wanted, saved) in compared.items():
        if wanted != saved:
            raise MolaError(
                f"`{flag}` must be the value that the adapter was made with: got {_text(wanted)}, {folder!r} has "
                f"{_text(saved)}. "
                "Leave the flag out: the adapter has its own settings."
            )


def _same_linears(model: Any, names: Any, others: Any) -> bool:
    """Whether two values of `target_modules` choose the same linears; adapters save "all-linear" as whole names."""
    try:
        first, second = ({each.name for each in linear_shapes(model, group)} for group in (names, others))
    except MolaError:  # a name that the model does not have
        return False
    return first == second


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
