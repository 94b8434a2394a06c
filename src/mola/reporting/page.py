"""The page of a run: which sections it has, in which order."""

from __future__ import annotations

from mola.reporting.agreement import agreement_section, leave_one_out_section
from mola.reporting.document import Section, render
from mola.reporting.experts import allocation_section, gates_section, redundancy_section, routing_section
from mola.reporting.load_run import Run
from mola.reporting.results import accuracy_section, loss_section
from mola.reporting.run_summary import making_section, summary
from mola.reporting.samples import samples_section


def render_page(run: Run) -> str:
    """The whole page; the same run always gives the same text.

    Args:
        run: what is known about it.
    """
    gates = gates_section(run)
    sections = [
        Section("accuracy", "Accuracy", accuracy_section(run)),
        Section("loss", "Loss", loss_section(run)),
        Section("allocation", "Experts by layer", allocation_section(run)),
        Section("gates", "Which experts work", gates),
        Section("routing", "Routers over training", routing_section(run)),
        Section("redundancy", "How alike experts are", redundancy_section(run)),
        Section("agreement", "How routers agree", agreement_section(run)),
        Section("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        Section("samples", "Samples", samples_section(run)),
        Section("making", "How it was made", making_section(run)),
    ]
    title = f"{run.name}: a run of mola"
    return render("run.html", title, sections, gates["choices"], run=run, summary=summary(run))
