"""`mola demo`: a page in the browser that shows answers with and without an adapter, and the experts behind them."""

import importlib.util
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from mola.data.templates import check_template
from mola.errors import MolaError
from mola.generation.decoding import decoding_settings
from mola.models.adapters import changes_base, check_adapter
from mola.models.options import ModelOptions, check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, trained_template
from mola.options.fields import START, option
from mola.serving.addresses import bind, cannot_listen, is_loopback

logger = logging.getLogger(__name__)


@dataclass
class DemoOptions(ModelOptions):
    """Options of `mola demo`."""

    _start: ClassVar = START
    adapter: str = field(metadata={"help": "Folder of an adapter."})
    host: str = option("127.0.0.1", "Address to listen on; by default this machine alone can connect.")
    port: int = option(7860, "Port to listen on.")
    template: str | None = option(
        None,
        "Prompt template at first. Default: that of the adapter's training, if its folder tells, else alpaca.",
    )
    max_new_tokens: int = option(128, "Longest answer in tokens to begin with.")


def main(options: DemoOptions) -> int:
    """Run the command until SIGINT or SIGTERM.

    Raises:
        MolaError: wrong options, or a port that is taken, before the model is loaded.
    """
    ended = threading.Event()
    with running_demo(options) as url:  # until here signals end the program at once
        before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            logger.info("The demo is at %s. Ctrl-C ends it.", url)
            ended.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


@contextmanager
def running_demo(options: DemoOptions) -> Iterator[str]:
    """The address of the page, served by threads of this program for the length of a `with` block.

    Raises:
        MolaError: wrong options, or a port that is taken, before the model is loaded.
    """
    _check(options)
    tokenizer = tokenizer_for(options)
    template_for(_template(options), tokenizer, options.adapter)
    model = model_for(options, options.adapter)
    from mola.serving.demonstration.answering import Answerer
    from mola.serving.demonstration.page import PageText, build_page, launch

    answerer = Answerer(model, tokenizer, options.adapter)
    text = PageText(options.base_model, options.adapter, _template(options), options.max_new_tokens)
    page = build_page(answerer, text)
    try:
        try:
            url = launch(page, options.host, options.port)
        except OSError as error:  # another program was faster
            raise cannot_listen(options.host, options.port, error) from error
        yield url
    finally:
        page.close(verbose=False)
        answerer.close()


def _template(options: DemoOptions) -> str:
    return options.template or trained_template(options.adapter) or "alpaca"


def _check(options: DemoOptions) -> None:
    """Everything that can be wrong without weights."""
    if importlib.util.find_spec("gradio") is None:
        raise MolaError("`mola demo` needs gradio. Run: pip install 'mola-peft[demo]'")
    check_template(_template(options))
    decoding_settings(options.max_new_tokens)
    if not 0 < options.port < 2**16:
        raise MolaError(f"`port` must be from 1 to 65535: got {options.port}.")
    check_model(options)
    reason = changes_base(check_adapter(options.adapter))
    if reason is not None:
        raise MolaError(
            f"`adapter` {options.adapter!r} {reason}, so the page could not show the base model beside it. Ask it with "
            "`mola generate`."
        )
    bind(options.host, options.port).close()
    if not is_loopback(options.host):
        logger.warning("Anyone who reaches %s can use this page: it asks for no password.", options.host)
