"""What to do when a run needs more memory, or more room on the disk, than there is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mola.files.failures import within_memory, writing
from mola.training.options import TrainOptions


@contextlib.contextmanager
def failures_explained(options: TrainOptions) -> Iterator[None]:
    """Turn errors of the block that are no bugs into ones that say what to do.

    Raises:
        MolaError: the memory or the disk did not suffice.
    """
    going_on = "Then go on from the last complete checkpoint, if there is one, with --resume_from_checkpoint last."
    room = "Free some space, or make the folder writable again (a lower --save_total_limit needs less)."
    with within_memory(f"{memory_advice(options)} {going_on}"), writing("`output_dir`", f"{room} {going_on}"):
        yield


def memory_advice(options: TrainOptions) -> str:
    """What of these options could be changed to need less memory, the least harmful first."""
    size, steps = options.per_device_train_batch_size, options.gradient_accumulation_steps
    ways = []
    if size > 1:
        smaller = size // 2 if size % 2 == 0 else 1
        ways.append(
            f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps {size * steps // smaller}, which "
            "gives the same effective batch"
        )
    if not options.activation_checkpointing:
        ways.append("--activation_checkpointing")
    if options.base_dtype == "float32":
        ways.append("--dtype bfloat16")
    ways.append(f"a lower --cutoff_len ({options.cutoff_len})")
    if options.eval_strategy != "no":
        ways.append(f"for the evaluation a lower --per_device_eval_batch_size ({options.per_device_eval_batch_size})")
    return f"Pass {'; or '.join(ways)}."
