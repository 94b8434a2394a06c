"""Options of `mola serve` and `mola demo`."""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from mola.errors import MolaError
from mola.models.options import ModelOptions
from mola.options.fields import START, Group, option, required


@dataclass
class ServeOptions(ModelOptions):
    """Options of `mola serve`."""

    _start: ClassVar = START
    adapter: list[str] | None = option(
        None,
        "Adapters, each NAME=FOLDER or FOLDER; a FOLDER alone is named after its last part. Several flags and a "
        "recipe add up. Or one skills folder, whose name asks the skill that knows.",
        action="extend",
    )
    engine: str = option(
        "mola",
        "Server to run: mola, or vllm, which serves one mixture or one skills folder.",
        choices=["mola", "vllm"],
        metavar="TEXT",
    )
    base_name: str | None = option(
        None, "Name of the base model in requests. Default: the last part of its folder, or its hub id."
    )
    host: str = option("127.0.0.1", "Address to listen on. By default only this machine can connect.")
    port: int = option(8000, "Port to listen on; 0 chooses a free port.")
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token that clients must send. The environment variable MOLA_API_KEY hides it better."},
    )

    adapter_root: str | None = option(
        None, "Folder below which clients may load adapters while the server runs; needs a token."
    )

    _batch: ClassVar = Group("batch")
    max_batch_size: int = option(
        32, "Maximum number of answers generated side by side; 1 generates one after the other."
    )
    max_batch_prefill_tokens: int = option(
        256, "Maximum number of prompt tokens read between two tokens of running answers."
    )
    max_batch_total_tokens: int | None = option(
        None,
        "Maximum of the number of answers side by side times the length of the longest one in tokens, prompt included. "
        "Default: the number of tokens that fits into a quarter of the free memory.",
    )

    max_loaded_skills: int | None = option(
        None,
        "Maximum number of a skills folder's LoRAs in memory, 64 by default. The one that was asked longest ago goes "
        "first; those of running answers stay.",
    )

    _limits: ClassVar = Group("limits")
    max_tokens: int = option(1024, "Maximum length of an answer in tokens.", "max_new_tokens")
    max_choices: int = option(16, "Maximum number of answers to one request: prompts times n.")
    max_waiting: int = option(
        128,
        "Maximum number of requests that wait, beyond `max_batch_size`; more requests are answered with status 429.",
    )
    max_body_bytes: int = option(1 << 20, "Maximum length of a request's body in bytes.")
    max_connections: int = option(
        256, "Maximum number of connections; further connections are answered with status 503."
    )
    shutdown_timeout: float = option(30.0, "Seconds that running answers get to finish when the server is stopped.")

    def adapters(self) -> list[str]:
        """The folders of the adapters that the options name."""
        return [split_adapter(text)[1] for text in self.adapter or []]


def split_adapter(text: str) -> tuple[str, str]:
    """The name and the folder in NAME=FOLDER or FOLDER; the name of a FOLDER alone is its last part.

    Raises:
        MolaError: the name or the folder is empty.
    """
    # The name of an existing folder may itself hold an equals sign.
    name, equals, folder = ("", "", text) if os.path.isdir(text) else text.partition("=")
    if not equals:
        name, folder = last_part(text), text
    if not name or not folder:
        raise MolaError(f"`adapter` must be NAME=FOLDER or FOLDER: got {text!r}.")
    return name, folder


def last_part(folder: str) -> str:
    """The name of a folder. A link keeps its own name; `.` has the name of the working folder."""
    return os.path.basename(os.path.abspath(folder))


@dataclass
class DemoOptions(ModelOptions):
    """Options of `mola demo`."""

    _start: ClassVar = START
    adapter: str = required("Folder of an adapter, or a skills folder.")
    host: str = option("127.0.0.1", "Address to listen on. By default only this machine can connect.")
    port: int = option(7860, "Port to listen on.")
    template: str | None = option(
        None,
        "Prompt template that the page selects at first. Default: the template of the training, if the adapter's "
        "folder records it, else alpaca; of a skills folder that of the skill that answers.",
    )
    max_new_tokens: int = option(128, "Maximum length of an answer in tokens that the page selects at first.")
