"""A page about an adapter that `mola inspect` looked at; nothing of a run needs to be there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.reporting.adapter_weights import read_adapter_weights
from mola.reporting.agreement import agreement_section, has_agreement, leave_one_out_section
from mola.reporting.document import Section, render
from mola.reporting.experts import allocation_section, gates_section, redundancy_section
from mola.reporting.load_run import Run
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
    gates = gates_section(run)
    sections = [
        Section("allocation", "Experts by layer", allocation_section(run) if weights else None),
        Section("gates", "Which experts work", gates),
        Section("redundancy", "How alike experts are", redundancy_section(run) if weights else None),
        Section("agreement", "How routers agree", agreement_section(run) if has_agreement(inspection) else None),
        Section("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        Section("samples", "Samples", looked_at_samples(inspection)),
    ]
    return render("inspection.html", f"{run.name}: experts, by mola", sections, gates["choices"], run=run)
