"""The page of a run: which sections it has, in which order."""

from __future__ import annotations

from mola.reporting.agreement import agreement_section, leave_one_out_section
from mola.reporting.document import document
from mola.reporting.experts import allocation_section, gates_section, redundancy_section, routing_section
from mola.reporting.heat import choice_rules
from mola.reporting.load_run import Run
from mola.reporting.markup import Element, element
from mola.reporting.results import accuracy_section, loss_section
from mola.reporting.run_summary import lead, making_section, summary
from mola.reporting.samples import samples_section


def render_page(run: Run) -> str:
    """The whole page; the same run always gives the same text.

    Args:
        run: what is known about it.
    """
    gates, choices = gates_section(run)
    sections = [
        ("accuracy", "Accuracy", accuracy_section(run)),
        ("loss", "Loss", loss_section(run)),
        ("allocation", "Experts by layer", allocation_section(run)),
        ("gates", "Which experts work", gates),
        ("routing", "Routers over training", routing_section(run)),
        ("redundancy", "How alike experts are", redundancy_section(run)),
        ("agreement", "How routers agree", agreement_section(run)),
        ("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        ("samples", "Samples", samples_section(run)),
        ("making", "How it was made", making_section(run)),
    ]
    rules = choice_rules(choices) if choices else ""
    return document(f"{run.name}: a run of mola", _header(run), sections, rules)


def _header(run: Run) -> Element:
    return element(
        "header", element("p", "Run of mola", class_="kicker"), element("h1", run.name), lead(run), summary(run)
    )
