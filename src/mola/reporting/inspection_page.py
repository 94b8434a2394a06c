"""A page about an adapter that `mola inspect` looked at; nothing of a run needs to be there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.reporting.adapter_weights import read_adapter_weights
from mola.reporting.agreement import agreement_section, leave_one_out_section
from mola.reporting.document import Section, document
from mola.reporting.experts import allocation_section, gates_section, redundancy_section
from mola.reporting.heat import choice_rules
from mola.reporting.load_run import Run
from mola.reporting.markup import Element, element, pairs
from mola.reporting.samples import looked_at_samples


def render_inspection(adapter: str, inspection: Mapping[str, Any]) -> str:
    """The whole page; the same arguments always give the same text.

    Args:
        adapter: folder of the adapter.
        inspection: content of the result file of `mola inspect`.
    """
    folder = Path(adapter)
    weights = read_adapter_weights(folder)
    run = Run(folder, {}, {}, weights, None, None, None, inspection, {})
    gates, choices = gates_section(run)
    sections: list[Section] = [
        ("allocation", "Experts by layer", allocation_section(run) if weights else []),
        ("gates", "Which experts work", gates),
        ("redundancy", "How alike experts are", redundancy_section(run) if weights else []),
        ("agreement", "How routers agree", agreement_section(run)),
        ("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        ("samples", "Samples", looked_at_samples(inspection)),
    ]
    rules = choice_rules(choices) if choices else ""
    return document(f"{run.name}: experts, by mola", _header(run.name, inspection), sections, rules)


def _header(name: str, inspection: Mapping[str, Any]) -> Element:
    settings = inspection["settings"]
    named = [("Base model", settings["base_model"]), ("Task", settings["task"]), ("Data", settings["data"])]
    return element(
        "header",
        element("p", "Experts seen by mola", class_="kicker"),
        element("h1", name),
        element("p", f"What the experts of an adapter do on {inspection['samples']:,} samples.", class_="lead"),
        pairs(named),
    )
