"""In which prompts an adapter was trained: others are none that it knows."""

import logging
import os
from pathlib import Path

from mola.files.reading import read_json_object

_RECORD = "run.json"  # of `mola train`

logger = logging.getLogger(__name__)


def trained_template(adapter: str | os.PathLike[str]) -> str | None:
    """Name of the prompt template of an adapter's training; None if its run folder does not tell."""
    folder = Path(adapter).expanduser().resolve()
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    for path in (place / _RECORD for place in places):
        record = read_json_object(path)
        if not record and path.exists():
            logger.warning("%s cannot be read: the adapter's template is not known. Pass `template`.", path)
        if record.get("template"):
            return str(record["template"])
    return None


def warn_of_other_template(adapter: str | os.PathLike[str] | None, asked: str) -> None:
    """Say so where an adapter is looked at in other prompts than those of its training."""
    trained = None if adapter is None else trained_template(adapter)
    if trained not in (None, asked):
        logger.warning(
            "The adapter was trained with the prompt template %s and is asked with %s: --template %s asks as before.",
            *(trained, asked, trained),
        )
