"""What a user can change when memory or disk space runs out, or a process is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mola.errors import MolaError
from mola.files.failures import explain_out_of_memory, explain_write_errors, lost_process_reason
from mola.training.distributed import shards_weights, uses_deepspeed
from mola.training.options import TrainOptions


@contextlib.contextmanager
def failures_explained(options: TrainOptions) -> Iterator[None]:
    """Turn machine errors in this block into errors that say what to do.

    Raises:
        MolaError: memory or disk space ran out, or another process of the run has ended.
    """
    resuming = "Then resume from the last complete checkpoint, if there is one, with --resume_from_checkpoint last."
    room = "Free some space, or make the folder writable again (a lower --save_total_limit needs less)."
    with (
        explain_out_of_memory(f"{memory_advice(options)} {resuming}"),
        explain_write_errors("`output_dir`", f"{room} {resuming}"),
    ):
        try:
            yield
        except Exception as error:
            reason = lost_process_reason(error)
            if reason is None:
                raise
            raise MolaError(
                f"another process of this run has ended, or does not answer: {reason}. Its own output, or the system's "
                f"log, may say why. Start all processes again with the same command. {resuming}"
            ) from error


def loading_advice(options: TrainOptions) -> str:
    """What to change when the base model alone needs more memory than is available."""
    ways = ["--dtype bfloat16"] if options.base_dtype == "float32" and not uses_deepspeed(options) else []
    if not (shards_weights(options) or options.quantizes_on_loading or options.gguf_file):
        ways += ["--load_in_4bit or --load_in_8bit"]
    return f"The base model does not fit: pass {'; or '.join([*ways, 'a smaller base model'])}."


def memory_advice(options: TrainOptions) -> str:
    """Which options to change so that a run needs less memory, the least harmful change first."""
    size, steps = options.per_device_train_batch_size, options.gradient_accumulation_steps
    ways = []
    if size > 1:
        smaller = size // 2 if size % 2 == 0 else 1
        ways.append(
            f"--batch_size {smaller} --gradient_accumulation_steps {size * steps // smaller}, which "
            "gives the same effective batch"
        )
    if not options.activation_checkpointing:
        ways.append("--activation_checkpointing")
    if options.base_dtype == "float32" and not uses_deepspeed(options):
        ways.append("--dtype bfloat16")
    ways.append(f"a lower --cutoff_len ({options.cutoff_len})")
    if options.eval_strategy != "no":
        ways.append(f"for the evaluation a lower --per_device_eval_batch_size ({options.per_device_eval_batch_size})")
    return f"Pass {'; or '.join(ways)}."
