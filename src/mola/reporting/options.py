"""Options of `mola inspect`, `mola report` and `mola doctor`."""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mola.errors import MolaError
from mola.models.options import ModelOptions
from mola.options.fields import START, Group, check_positive, check_results, option, required

LEAVE_ONE_OUT = ("none", "layers", "modules")


@dataclass
class InspectOptions(ModelOptions):
    """Options of `mola inspect`."""

    _start: ClassVar = START
    adapter: str = required("Folder of an adapter, or a skills folder: which skill do the data ask?")
    data: str = required("Data: a JSON, JSONL, CSV or parquet file, a folder, or a Hub id.")
    task: str | None = option(
        None, "Task: its name or a YAML file. Default: that of the adapter's training, if there is one."
    )

    _data: ClassVar = Group("data")
    split: str = option("test", "Split to read if the data has several.")
    filters: dict[str, Any] | str | None = option(None, "Keep rows with these values: {column: value, or a list}.")
    limit: int | None = option(200, "Number of samples to inspect, from the first on.")
    template: str | None = option(
        None,
        "Prompt template; chat is the chat template of adapter or base model. Default: the one of the adapter's "
        "training, else the task's own, else the tokenizer's chat template, else alpaca.",
    )

    _measured: ClassVar = Group("what is measured")
    examples: int = option(8, "Number of samples, evenly spread, whose mean gates go into the result file.")
    leave_one_out: str = option(
        "none",
        "Measure the loss on answers without each expert: none, layers (leaves out the expert with a given number in "
        "all modules of a layer) or modules (in one module). This takes one forward pass per expert and sample.",
    )
    leave_one_out_limit: int = option(16, "Number of samples for `leave_one_out`, from the first on.")

    _results: ClassVar = Group("results")
    json: str | None = option(None, "Result file (JSON) with every module.", writes="file")
    html: str | None = option(None, "Page (HTML) with heat maps and charts, which needs no other file.", writes="file")
    overwrite: bool = option(False, "Replace existing results.")

    def check(self) -> None:
        """Check what needs neither model nor data.

        Raises:
            MolaError: a value is wrong, or a result would replace a file.
        """
        check_positive(limit=self.limit, leave_one_out_limit=self.leave_one_out_limit)
        if self.examples < 0:
            raise MolaError(f"`examples` must be at least 0: got {self.examples}. Pass 0 for none.")
        if self.leave_one_out not in LEAVE_ONE_OUT:
            raise MolaError(
                f"`leave_one_out` must be one of {', '.join(LEAVE_ONE_OUT)}: got {self.leave_one_out!r}. Pass layers."
            )
        check_results(self)
        if self.json and self.html and os.path.realpath(self.json) == os.path.realpath(self.html):
            raise MolaError(f"`json` and `html` must be two files: both are {self.json!r}. Choose a different name.")


@dataclass
class ReportOptions:
    """Options of `mola report`."""

    run_dir: str = field(metadata={"help": "Run folder of `mola train`, or folder of an adapter."})
    before: str | None = option(
        None, "Result of `mola evaluate` without the adapter; by default before.json in the run folder."
    )
    after: str | None = option(
        None, "Result of `mola evaluate` with the adapter; by default after.json in the run folder."
    )
    inspection: str | None = option(None, "Result of `mola inspect`; by default inspect.json in the run folder.")
    export: str | None = option(
        None, "Report of `mola convert --to lora`, its export.json; by default export.json in the run folder."
    )
    output: str | None = option(None, "The page; by default report.html in the run folder.")
    overwrite: bool = option(
        False, "Replace any existing file. An unchanged report of mola is replaced without this option."
    )


@dataclass
class DoctorOptions:
    """Options of `mola doctor`."""

    run_dir: str = field(metadata={"help": "Run folder of `mola train`, or folder of an adapter."})
    export: str | None = option(
        None, "Report of `mola convert --to lora`, its export.json; by default export.json in the run folder."
    )
    json: str | None = option(None, "Result file (JSON).", writes="file")
    overwrite: bool = option(False, "Replace an existing result file.")
