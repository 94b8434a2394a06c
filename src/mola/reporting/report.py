"""`mola report`: one HTML page about a run or an adapter, from the files in its folder. The command loads no model."""

import logging
from pathlib import Path

from mola.errors import MolaError
from mola.files.atomic import atomic_write_text, check_writable
from mola.files.digests import add_digest_line, is_own_file
from mola.files.terminal import OutputConsole
from mola.reporting import REPORT_FILE
from mola.reporting.document import Section, render
from mola.reporting.expert_sections import (
    agreement_section,
    allocation_section,
    gates_section,
    leave_one_out_section,
    may_have_agreement,
    redundancy_section,
    routing_section,
)
from mola.reporting.load_run import Run, load_run, outdated_results, results_of_other_adapters
from mola.reporting.options import ReportOptions
from mola.reporting.result_sections import (
    accuracy_section,
    free_text_section,
    loss_section,
    samples_section,
    worth_section,
)
from mola.reporting.run_summary import making_section, summarize_run

logger = logging.getLogger(__name__)


def report(options: ReportOptions) -> Path:
    """Write the page.

    Args:
        options: the run, its results and the file to write.

    Returns:
        The file.

    Raises:
        MolaError: the folder holds no run and no adapter, a result file is of a different kind, or the page would
            replace a file that mola did not write or that was changed since.
    """
    results = {name: getattr(options, name) for name in ("before", "after", "inspection", "export")}
    run = load_run(options.run_dir, **results)
    target = Path(options.output or run.folder / REPORT_FILE)
    if target.exists() and not (options.overwrite or target.is_dir() or is_own_file(target)):
        raise MolaError(
            f"`output` must be a new file, or an unchanged report of mola: {str(target)!r} is something else, or was "
            "changed. Pass a different name or `overwrite`."
        )
    check_writable(target)
    for name in outdated_results(run):
        logger.warning("%s is older than the adapter: was it made with an earlier one?", run.paths[name])
    for name, adapter in results_of_other_adapters(run):
        logger.warning("%s was measured with a different adapter: %r", run.paths[name], adapter)
    return atomic_write_text(target, add_digest_line(render_page(run)))


def main(options: ReportOptions) -> int:
    """Run the command and print where the page is."""
    path = report(options)
    OutputConsole().print(f"Open {path} in a browser", highlight=False, markup=False, soft_wrap=True)
    return 0


def render_page(run: Run) -> str:
    """The page of a run; the same run always gives the same text."""
    gates = gates_section(run) if run.has_routers else None
    sections = [
        Section("accuracy", "Accuracy", accuracy_section(run)),
        Section("free-text", "Loss of free text", free_text_section(run)),
        Section("worth", "What routing is worth", worth_section(run)),
        Section("loss", "Loss", loss_section(run)),
        Section("allocation", "Experts by layer", allocation_section(run)),
        Section("gates", "Which experts work", gates),
        Section("routing", "Routers over training", routing_section(run) if run.has_routers else None),
        Section("redundancy", "How alike experts are", redundancy_section(run)),
        Section("agreement", "How routers agree", agreement_section(run) if may_have_agreement(run) else None),
        Section("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        Section("samples", "Samples", samples_section(run)),
        Section("making", "How it was made", making_section(run)),
    ]
    return render(
        "run.html",
        f"{run.name}: a run of mola" if run.has_record else f"{run.name}: an adapter",
        sections,
        gates["choices"] if gates else (),
        run=run,
        summary=summarize_run(run),
        others=results_of_other_adapters(run),
    )
