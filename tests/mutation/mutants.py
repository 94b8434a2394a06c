"""Which faults: cosmic-ray's, one for every place in the code, drawn by a seed."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

Position = tuple[int, int]


@dataclass(frozen=True)
class Mutant:
    """A fault: what `operator` does at its `occurrence`-th chance in the file at `path`."""

    path: str
    line: int
    column: int
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        """The place and what is done there."""
        return f"{self.path}:{self.line}:{self.column} {self.operator.removeprefix('core/')}"

    def source(self) -> bytes:
        """The text of the file with the fault."""
        changed = mutate_code(Path(self.path).read_bytes().decode(), get_operator(self.operator)(), self.occurrence)
        assert changed is not None, self.name
        return changed.encode()


def draw(paths: Iterable[Path], seed: int, limit: int | None = None) -> list[Mutant]:
    """One mutant for every place, in random order; `limit` of them.

    Annotations are left out: they are never evaluated, so no test can notice.

    Args:
        paths: files to put faults into.
        seed: of the drawing.
        limit: how many; None for one at every place.
    """
    rng = random.Random(seed)
    places: dict[tuple[str, Position, str], list[Mutant]] = {}
    for path in sorted(paths):
        tree, annotations = get_ast_from_path(path), _annotations(path)
        for name in sorted(operator_names()):
            operator_class = get_operator(name)
            if operator_class.arguments():
                continue
            operator = operator_class()
            chances = (start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node))
            for occurrence, (line, column) in enumerate(chances):
                if any(start <= (line, column) <= end for start, end in annotations):
                    continue
                kind = name.split("_")[0]
                mutants = places.setdefault((str(path), (line, column), kind), [])
                mutants.append(Mutant(str(path), line, column, name, occurrence))
    chosen = [rng.choice(mutants) for _, mutants in sorted(places.items())]
    rng.shuffle(chosen)
    return chosen[:limit]


def _annotations(path: Path) -> list[tuple[Position, Position]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                end = (part.end_lineno or part.lineno, part.end_col_offset or part.col_offset)
                found.append(((part.lineno, part.col_offset), end))
    return found
