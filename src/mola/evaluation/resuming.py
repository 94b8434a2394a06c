"""The answers of an unfinished evaluation, so that an interrupted evaluation resumes where it stopped.

The answers are in `<output>.partial.jsonl`, beside the result file: one JSON object per line. The first line says how
the answers are made, every further line is one answered sample.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mola.checkpoints.adapter_settings import SKILLS_FILE, is_skills_folder, named_adapter
from mola.data.encode import data_fingerprint
from mola.data.tasks import Task
from mola.errors import MolaError
from mola.files.atomic import append_lines, check_writable
from mola.files.digests import file_sha256
from mola.files.environment import software_versions
from mola.models.devices import resolve_device, resolve_dtype
from mola.options.fields import find_difference

logger = logging.getLogger(__name__)


class AnswersFile:
    """The answers of an unfinished evaluation.

    Args:
        output: the result file.
        made_with: what must be equal for the answers to be used again, see `answers_made_with`.
    """

    def __init__(self, output: str | os.PathLike[str], made_with: Mapping[str, Any]):
        self.path = check_writable(f"{os.fspath(output)}.partial.jsonl")
        # Through JSON once, so that tuples and lists compare equal after reading.
        self.made_with: dict[str, Any] = json.loads(json.dumps(made_with))

    def read(self, discard_others: bool = False) -> list[dict[str, Any]]:
        """The answered samples; empty if there are none.

        Args:
            discard_others: delete answers that were made with other settings, instead of raising.

        Raises:
            MolaError: the file cannot be read, or its answers were made with other settings.
        """
        if not self.path.exists():
            return []
        try:
            *complete, cut_off = self.path.read_bytes().split(b"\n")
            if cut_off:  # the line was interrupted while it was written
                os.truncate(self.path, self.path.stat().st_size - len(cut_off))
            if not complete:
                return []
            made_with, *records = [json.loads(line) for line in complete]
        except (OSError, ValueError) as error:
            raise MolaError(f"`{self.path}` cannot be read ({error}). Delete the file to start again.") from error
        key = find_difference(made_with, self.made_with)
        if key is None:
            return records
        if not discard_others:
            raise MolaError(
                f"`{self.path}` holds {len(records)} samples of an unfinished run with other settings: {key} "
                f"{made_with.get(key)!r} there, {self.made_with.get(key)!r} now. Use the same settings to resume it, "
                "a different `output`, or `overwrite` to discard it."
            )
        logger.warning("%s: discarding %d samples made with other settings.", self.path, len(records))
        self.remove()
        return []

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add answered samples."""
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        entries = [self.made_with, *records] if is_new else records
        append_lines(self.path, (json.dumps(entry, ensure_ascii=False) for entry in entries))

    def remove(self) -> None:
        """Delete the file if there is one."""
        self.path.unlink(missing_ok=True)


def answers_made_with(
    options: Any, task: Task | None, template: str, examples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that the answers depend on.

    Args:
        options: the `EvaluateOptions`.
        task: the task whose answers are scored; None if the loss of free text is measured.
        template: name of the prompt template, which may be that of the adapter's training.
        examples: the data.

    Returns:
        The options, the task, the data, and the weights, versions, device and dtype.
    """
    device, adapter = resolve_device(options.device), named_adapter(options.adapter, options.skill)
    settings = {key: value for key, value in asdict(options).items() if key not in ("output", "overwrite")}
    # `data_fingerprint` covers the texts; the right answer and the number of choices decide the score.
    answers = [[example["answer"], example["num_choices"]] for example in examples]
    return {
        **settings,
        "template": template,
        "task_version": task and task.version,
        "task_fingerprint": task and task.fingerprint(),
        "data_fingerprint": data_fingerprint(examples),
        "answers_fingerprint": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
        "weights": [_file_stamps(folder) for folder in (options.base_model, adapter) if folder],
        "versions": software_versions(),
        "computed": [device.type, str(resolve_dtype(options.dtype, device)[0])],
    }


def _file_stamps(folder: str) -> list[list[Any]]:
    """Name, size and modification time of each file of a local model; empty for a hub id.

    Of a skills folder it is the digest of the file that holds the digests of all skills.
    """
    if is_skills_folder(folder):
        return [[SKILLS_FILE, file_sha256(Path(folder, SKILLS_FILE))]]
    kinds = ("*.safetensors", "*.bin", "*.gguf", "*config.json", "*.jinja")
    files = sorted(file for kind in kinds for file in Path(folder).glob(kind))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
