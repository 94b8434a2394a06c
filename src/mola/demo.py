"""`mola demo`: a page in the browser that shows answers with and without an adapter, and the experts behind them."""

import importlib.util
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mola.addresses import is_loopback
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.generate import decoding_settings
from mola.loading import check_adapter, load_config, load_model, load_tokenizer, resolve_device, resolve_dtype
from mola.options import option
from mola.quantization import check_quantization, check_quantized_base, quantization_of, quantization_option

logger = logging.getLogger(__name__)


@dataclass
class DemoOptions:
    """Options of `mola demo`."""

    base_model: str = field(metadata={"help": "Folder or hub id of the base model."})
    adapter: str = field(metadata={"help": "Folder of an adapter."})
    host: str = option("127.0.0.1", "Address to listen on; by default this machine alone can connect.")
    port: int = option(7860, "Port to listen on.")
    template: str = option("alpaca", "Prompt template to begin with.")
    max_new_tokens: int = option(128, "Longest answer in tokens to begin with.")
    dtype: str = option("auto", "Number format: auto, float32, bfloat16 or float16.")
    load_in_8bit: bool = quantization_option("load_in_8bit")
    load_in_4bit: bool = quantization_option("load_in_4bit")
    bnb_4bit_quant_type: str | None = quantization_option("bnb_4bit_quant_type")
    bnb_4bit_compute_dtype: str | None = quantization_option("bnb_4bit_compute_dtype")
    bnb_4bit_use_double_quant: bool = quantization_option("bnb_4bit_use_double_quant")
    gguf_file: str | None = quantization_option("gguf_file")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")
    trust_remote_code: bool = option(False, "Run code shipped with the model.")


def main(options: DemoOptions) -> int:
    """Run the command until SIGINT or SIGTERM.

    Returns:
        The exit code, 0.

    Raises:
        MolaError: wrong options, before the model is loaded; a port that is taken.
    """
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with running_demo(options) as url:
            logger.info("The demo is at %s. Ctrl-C ends it.", url)
            ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


@contextmanager
def running_demo(options: DemoOptions) -> Iterator[str]:
    """The page, served by threads of this program for the length of a `with` block.

    Args:
        options: as of the command.

    Yields:
        The address of the page.

    Raises:
        MolaError: wrong options, before the model is loaded; a port that is taken.
    """
    _check(options)
    tokenizer = load_tokenizer(options.base_model, "left", options.trust_remote_code, options.gguf_file)
    model = load_model(
        options.base_model,
        options.adapter,
        options.dtype,
        options.device,
        options.trust_remote_code,
        quantization=quantization_of(options),
    )
    from mola.demonstration.answering import Answerer
    from mola.demonstration.page import PageText, build_page, launch

    answerer = Answerer(model, tokenizer)
    text = PageText(options.base_model, options.adapter, options.template, options.max_new_tokens)
    page = build_page(answerer, text)
    try:
        try:
            url = launch(page, options.host, options.port)
        except OSError as error:
            raise MolaError(f"`port` {options.port} of {options.host} is not free: {error}. Pass another.") from error
        yield url
    finally:
        page.close(verbose=False)
        answerer.close()


def _check(options: DemoOptions) -> None:
    """Everything that can be wrong without weights."""
    if importlib.util.find_spec("gradio") is None:
        raise MolaError("`mola demo` needs gradio. Run: pip install 'mola-peft[demo]'")
    get_template(options.template)
    decoding_settings(options.max_new_tokens)
    if not 0 < options.port < 2**16:
        raise MolaError(f"`port` must be from 1 to 65535: got {options.port}.")
    device, quantization = resolve_device(options.device), quantization_of(options)
    check_quantization(quantization, device, resolve_dtype(options.dtype, device)[0])
    config = load_config(options.base_model, options.trust_remote_code, options.gguf_file)
    check_quantized_base(options.base_model, config, quantization, device)
    check_adapter(options.adapter)
    if not is_loopback(options.host):
        logger.warning("Anyone who reaches %s can use this page: it asks for no password.", options.host)
