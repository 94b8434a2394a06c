"""`mola generate`: one answer, or a loop that reads one instruction per line.

Standard output carries the generated text alone.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TextStreamer

from mola.data.templates import CHAT, Template, check_template
from mola.errors import MolaError
from mola.generation.decoding import decoding_settings, encoded_prompt, generate_text
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.options import ModelOptions, check_model, model_for, tokenizer_for
from mola.models.prompts import own_chat, template_for, trained_template
from mola.options.fields import START, Group, check_seed, option

logger = logging.getLogger(__name__)


@dataclass
class GenerateOptions(ModelOptions):
    """Options of `mola generate`."""

    _start: ClassVar = START
    adapter: str | None = option(None, "Folder of an adapter.")
    prompt: str | None = option(None, "Text to continue, used as it is.")
    instruction: str | None = option(None, "Instruction, put through the template.")
    input: str | None = option(None, "Context of the instruction.")

    _answer: ClassVar = Group("answer")
    template: str | None = option(
        None,
        "Prompt template for instructions. Default: that of the adapter's training, if its folder tells or that of the "
        "merged model, else alpaca.",
    )
    max_new_tokens: int = option(128, "Longest answer in tokens.")
    temperature: float | None = option(
        None, "Sampling temperature; 0 is greedy. Giving it, top_p or top_k turns sampling on."
    )
    top_p: float | None = option(None, "Sample from the most probable tokens that hold this probability.")
    top_k: int | None = option(None, "Sample from this many most probable tokens.")
    do_sample: bool | None = option(None, "Sample or not; by default only if a sampling value is given.")
    seed: int | None = option(None, "Random seed; by default another one each time.")
    stream: bool = option(True, "Print the text while it is generated.")


def main(options: GenerateOptions) -> int:
    """Run the command: one prompt, or lines from standard input until its end or `/exit`.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    _check_text(options)
    if options.adapter is not None:
        check_adapter(options.adapter)
    name = _template_of(options)
    check_template(name)
    config = check_model(options)
    tokenizer = tokenizer_for(options)
    template = template_for(name, tokenizer, options.adapter)
    prompt = template.prompt(options.instruction, options.input) if options.instruction is not None else options.prompt
    form = template if options.prompt is None else None  # of the prompt
    if prompt is not None:
        encoded_prompt(tokenizer, prompt, options.max_new_tokens, max_positions(config), form is not None, form)
    model = model_for(options, options.adapter)
    # torch starts every process with the same state, so "another text each time" needs a fresh seed.
    seed = torch.seed() % 2**63 if options.seed is None else options.seed
    torch.manual_seed(seed)
    if decoding_settings(**_decoding(options))["do_sample"]:
        logger.info("Random seed %d.", seed)
    if prompt is not None:
        _answer(model, tokenizer, prompt, options, form)
        return 0
    for line in _read_lines():
        try:
            _answer(model, tokenizer, template.prompt(line, ""), options, template)
        except MolaError as error:  # such as a line too long: the loop goes on
            print(error, file=sys.stderr)
    return 0


def _decoding(options: GenerateOptions) -> dict[str, Any]:
    """The options that `decoding_settings` and `generate_text` share."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample")
    return {name: getattr(options, name) for name in names}


def _template_of(options: GenerateOptions) -> str:
    """What was asked for, or what the adapter was trained with: other prompts are none that it knows."""
    if options.template is not None:
        return options.template
    if options.prompt is not None:
        return "alpaca"  # which is not used
    if options.adapter is None:
        merged = trained_template(options.base_model) if os.path.isdir(options.base_model) else None
        return merged or "alpaca"  # `mola merge` writes down what the adapter was trained in
    trained = trained_template(options.adapter)
    if trained is None:
        logger.warning(
            "%s does not say in which prompts it was trained: it is asked with the template alpaca. Pass `template`%s, "
            "or the whole text as `prompt`.",
            options.adapter,
            f" ({CHAT}, if these were chats, whose template is beside it)" if own_chat(options.adapter) else "",
        )
    return trained or "alpaca"


def _check_text(options: GenerateOptions) -> None:
    """What can be wrong with what is asked."""
    samples = decoding_settings(**_decoding(options))["do_sample"]
    unused = [name for name in ("top_p", "top_k") if getattr(options, name) is not None]
    if options.temperature == 0 and unused:
        raise MolaError(
            f"`temperature` 0 is greedy, so `{unused[0]}` {getattr(options, unused[0])} would do nothing. Leave one "
            "of them out."
        )
    if options.seed is not None:
        check_seed(options.seed)
        if not samples:
            raise MolaError(
                f"`seed` ({options.seed}) is of sampling, and this is greedy. Pass `temperature`, or leave it out."
            )
    if options.prompt is not None and (options.instruction is not None or options.input is not None):
        raise MolaError(
            "`prompt` is used as it is and cannot be combined with `instruction` or `input`: got both. "
            "Pass one of them."
        )
    if options.prompt is not None and options.template is not None:
        raise MolaError(
            f"`prompt` is used as it is, without the `template` {options.template!r}: got both. Leave one out, or "
            "pass the text as `instruction`."
        )
    if options.input is not None and options.instruction is None:
        raise MolaError(f"`input` needs an `instruction`: got only the input {options.input[:80]!r}.")


def _answer(model: Any, tokenizer: Any, prompt: str, options: GenerateOptions, template: Template | None) -> None:
    streamer = None
    if options.stream:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    how: dict[str, Any] = {"before_answer": template is not None, "template": template}
    text = generate_text(model, tokenizer, prompt, **_decoding(options), streamer=streamer, **how)
    if streamer is None:
        print(text)
    sys.stdout.flush()


def _read_lines() -> Iterator[str]:
    """Instructions from standard input; blank lines are skipped."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is one error, not the end
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        print("One instruction per line; /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        if is_interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()
