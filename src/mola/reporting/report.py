"""`mola report`: one HTML file about a run, from what its folder holds. No model is loaded."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from mola.errors import MolaError
from mola.files.atomic import atomic_write_text, check_writable
from mola.files.digests import is_own_file, with_mark
from mola.files.terminal import OutputConsole
from mola.options.fields import option
from mola.reporting import REPORT_FILE
from mola.reporting.load_run import gather, old_results, other_adapters, read_record
from mola.reporting.page import render_page

logger = logging.getLogger(__name__)


@dataclass
class ReportOptions:
    """Options of `mola report`."""

    run_dir: str = field(metadata={"help": "Run folder of `mola train`."})
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
        False, "Replace a file that is there, whatever it is; a report as mola wrote it is replaced without this."
    )


def report(options: ReportOptions) -> Path:
    """Write the page.

    Args:
        options: what it is about.

    Returns:
        The file.

    Raises:
        MolaError: no run in the folder, a file that is not what it should be, or the page would replace a file that
            mola did not write or that was changed since.
    """
    read_record(options.run_dir)
    target = _target(options)
    run = gather(options.run_dir, options.before, options.after, options.inspection, options.export)
    for name in old_results(run):
        logger.warning("%s is older than the adapter: was it made with an earlier one?", run.paths[name])
    for name, adapter in other_adapters(run):
        logger.warning("%s was measured with another adapter: %r", run.paths[name], adapter)
    return atomic_write_text(target, with_mark(render_page(run)))


def main(options: ReportOptions) -> int:
    """Run the command and print where the page is."""
    path = report(options)
    OutputConsole().print(f"Open {path} in a browser", highlight=False, markup=False, soft_wrap=True)
    return 0


def _target(options: ReportOptions) -> Path:
    path = Path(options.output or Path(options.run_dir) / REPORT_FILE)
    if path.exists() and not (options.overwrite or path.is_dir() or is_own_file(path)):
        raise MolaError(
            f"`output` must be a new file, or a report as mola wrote it: {str(path)!r} is something else, or was "
            "changed since. Pass another name or `overwrite`."
        )
    return check_writable(path)
