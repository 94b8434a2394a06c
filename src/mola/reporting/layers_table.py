"""Experts by layer, in the page about a run and in the model card."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from mola.reporting.adapter_weights import LayerExperts
from mola.reporting.document import Table
from mola.reporting.formatting import layers

_HEAD = ("layers", "experts", "top_k", "r", "values of experts", "values of routers")


def layers_table(rows: Sequence[LayerExperts]) -> Table:
    """One line for neighbours that are equal, and one for modules outside the layers, if there are any."""
    lines = []
    for (_, *same), members in groupby(enumerate(rows), key=_neighbours):
        lines.append((layers([row.layer_index for _, row in members]), *same))
    return Table(_HEAD, lines, "Experts by layer; each figure is for one layer")


def _neighbours(place_and_row: tuple[int, LayerExperts]) -> tuple[Any, ...]:
    place, row = place_and_row
    values = (row.top_k, row.r, row.expert_values, row.router_values)
    # A layer that is not adapted has no row, and ends a run of equal ones.
    return (row.layer_index or 0) - place, row.experts_said, *(f"{value:,}" for value in values)
