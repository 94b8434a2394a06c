"""`mola demo`: a page in the browser that shows answers with and without an adapter, and the experts behind them.

Of a skills folder it shows the answer of the skill that knows, and its name.
"""

import importlib.util
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.data.templates import check_template
from mola.errors import MolaError
from mola.generation.decoding import decoding_settings
from mola.models.adapters import changes_base, check_adapter
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, template_of
from mola.serving.options import DemoOptions

logger = logging.getLogger(__name__)


def main(options: DemoOptions) -> int:
    """Run the command until SIGINT or SIGTERM.

    Raises:
        MolaError: wrong options, or a port that is taken, before the model is loaded.
    """
    stopped = threading.Event()
    with running_demo(options) as url:  # while the model loads, a signal ends the program at once
        before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            logger.info("The demo is at %s. Ctrl-C ends it.", url)
            stopped.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


@contextmanager
def running_demo(options: DemoOptions) -> Iterator[str]:
    """Serve the page with threads of this program during a `with` block; yields its address.

    Raises:
        MolaError: wrong options, or a port that is taken, before the model is loaded.
    """
    has_skills = is_skills_folder(options.adapter)
    template = options.template or (None if has_skills else template_of(options.adapter) or "alpaca")
    _check(options, template)
    tokenizer = tokenizer_for(options)
    if not has_skills:
        template_for(str(template), tokenizer, options.adapter)  # raises before the weights load
    model = model_for(options, options.adapter)
    from mola.serving.demonstration.answering import Answerer
    from mola.serving.demonstration.page import build_page, launch

    answerer = Answerer(model, tokenizer, options.adapter)
    page = build_page(answerer, options.base_model, template, options.max_new_tokens)
    try:
        yield launch(page, options.host, options.port)
    finally:
        page.close(verbose=False)
        answerer.close()


def _check(options: DemoOptions, template: str | None) -> None:
    """Find wrong options before the weights load."""
    if importlib.util.find_spec("gradio") is None:
        raise MolaError("`mola demo` needs gradio. Run: pip install 'mola-peft[demo]'")
    from mola.serving.server import bind, is_loopback

    check_template(template or "")
    decoding_settings(options.max_new_tokens)
    check_model(options)
    if not is_skills_folder(options.adapter) and (reason := changes_base(check_adapter(options.adapter))) is not None:
        raise MolaError(
            f"`adapter` {options.adapter!r} {reason}, so the page cannot show the base model beside it. Use "
            "`mola generate`."
        )
    bind(options.host, options.port).close()
    if not is_loopback(options.host):
        logger.warning("Anyone who reaches %s can use this page: it asks for no password.", options.host)
