"""`mola prepare --num_samples`: splits drawn from one source."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mola.data.source import single_source
from mola.data.tasks import Task
from mola.data.write import PROMPT_COLUMNS, Merge, write_spooled
from mola.errors import MolaError
from mola.files.atomic import complete_folder

HELD_OUT_SIZE = 1000  # validation and test rows, if nothing else is said


def drawn_sizes(num_samples: int, num_validation: int | None, num_test: int | None) -> dict[str, int]:
    """Rows to draw for every split, checked; None means 1000.

    Raises:
        MolaError: `num_samples` is below 1, or another one below 0.
    """
    sizes = {"train": num_samples, "validation": num_validation, "test": num_test}
    names = {"train": "num_samples", "validation": "num_validation", "test": "num_test"}
    result = {split: HELD_OUT_SIZE if size is None else size for split, size in sizes.items()}
    for split, size in result.items():
        least = 1 if split == "train" else 0
        if size < least:
            raise MolaError(f"`{names[split]}` must be at least {least}: got {size}. Choose another number.")
    return result


def prepare_drawn(task: Task, data: str, sizes: Mapping[str, int], seed: int, output_dir: Path) -> dict[str, Any]:
    """Draw samples and write them as `prepare` does; an empty split is not written.

    Raises:
        MolaError: the source has too few rows, or a row does not fit.
    """
    from mola.data.draw.subset import draw_subset
    from mola.data.spool import Spool

    source = single_source(data)
    wanted = {split: size for split, size in sizes.items() if size}
    with (
        complete_folder(output_dir) as folder,
        TemporaryDirectory() as scratch,
        Spool(Path(scratch, "rows"), last=PROMPT_COLUMNS) as spool,
    ):
        merge = Merge(task)
        subset = draw_subset(source, task, wanted, seed, spool, merge)
        write_spooled(spool, subset.numbers, folder, Path(scratch))
    print(subset.summary())
    merge.say_replaced()
    print(f"written to {output_dir}")
    candidates = subset.candidates
    return {
        "output_dir": str(output_dir),
        "task": task.name,
        "splits": {split: {"rows": size, "filtered": 0} for split, size in wanted.items()},
        "shared_instructions": subset.shared_instructions,
        "source": {
            "rows": candidates.rows,
            "candidates": len(candidates.numbers),
            **candidates.left_out,
            "groups": subset.num_groups,
        },
    }
