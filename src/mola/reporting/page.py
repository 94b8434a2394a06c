"""The pages about a run and about an adapter: which sections they have, in which order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.reporting.adapter_weights import read_adapter_weights
from mola.reporting.agreement import agreement_section, has_agreement, leave_one_out_section, may_agree
from mola.reporting.document import Section, render
from mola.reporting.experts import allocation_section, gates_section, redundancy_section, routing_section
from mola.reporting.load_run import Run, other_adapters
from mola.reporting.results import accuracy_section, loss_section
from mola.reporting.run_summary import making_section, summary
from mola.reporting.samples import looked_at_samples, samples_section
from mola.reporting.worth import worth_section


def render_page(run: Run) -> str:
    """The whole page; the same run always gives the same text."""
    gates = gates_section(run) if run.has_routers else None
    sections = [
        Section("accuracy", "Accuracy", accuracy_section(run)),
        Section("worth", "What routing is worth", worth_section(run)),
        Section("loss", "Loss", loss_section(run)),
        Section("allocation", "Experts by layer", allocation_section(run)),
        Section("gates", "Which experts work", gates),
        Section("routing", "Routers over training", routing_section(run) if run.has_routers else None),
        Section("redundancy", "How alike experts are", redundancy_section(run)),
        Section("agreement", "How routers agree", agreement_section(run) if may_agree(run) else None),
        Section("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        Section("samples", "Samples", samples_section(run)),
        Section("making", "How it was made", making_section(run)),
    ]
    title = f"{run.name}: a run of mola"
    return render(
        "run.html",
        title,
        sections,
        (gates or {}).get("choices", ()),
        run=run,
        summary=summary(run),
        others=other_adapters(run),
    )


def render_inspection(adapter: str, inspection: Mapping[str, Any]) -> str:
    """The page of a folder and its `mola inspect` result; the same arguments always give the same text."""
    folder = Path(adapter)
    weights = read_adapter_weights(folder)
    run = Run(folder, {}, {}, weights, None, None, None, inspection, None, {})
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
