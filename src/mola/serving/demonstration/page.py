"""The page of `mola demo`: prompt, sampling, both answers side by side, and the experts behind one of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from mola.architecture.layer_stacks import module_kinds
from mola.data.templates import template_names
from mola.errors import MolaError
from mola.insight.tables import layers_table, tokens_table
from mola.serving.demonstration.answering import Answer, Answerer, Experts

_AS_IT_IS = "none: the text as it is"
_NOTHING_YET = "<p>Which experts worked on an answer is shown here once there is one.</p>"
_EXPERTS = (
    "Of the answer with the adapter. Experts are numbered within their module: "
    "expert 1 of one layer has nothing to do with expert 1 of another."
)
_NO_ROUTERS = "<p>No module of this adapter has a router: it is no mixture of experts.</p>"
# The fonts of the machine: a page from this machine asks no other one for anything.
_FONT, _FONT_MONO = ["system-ui", "sans-serif"], ["monospace"]


class PageText(NamedTuple):
    """What a page says about its model."""

    base_model: str
    adapter: str
    template: str
    max_new_tokens: int


def build_page(answerer: Answerer, text: PageText) -> gr.Blocks:
    """The page, to be launched; `text` has its names and the first values of the controls."""
    with gr.Blocks(title="mola", analytics_enabled=False) as page:
        gr.Markdown(f"# mola\nBase model `{text.base_model}`, adapter `{text.adapter}`")
        prompt = gr.Textbox(label="Instruction", lines=3, autofocus=True)
        choices = [*template_names(), _AS_IT_IS]
        template = gr.Dropdown(choices, value=text.template, label="Template")
        sampling = _sampling(text.max_new_tokens)
        with gr.Row():
            start, stop = gr.Button("Answer", variant="primary"), gr.Button("Stop")
        with gr.Row():
            adapted = gr.Textbox(label="With the adapter", lines=8, buttons=["copy"])
            plain = gr.Textbox(label="Base model alone", lines=8, buttons=["copy"])
        experts, given = gr.State(None), gr.State(None)
        gr.Markdown(f"## Experts\n{_EXPERTS}")
        with gr.Row():
            kind = gr.Dropdown([], label="Module", interactive=True)
            layer = gr.Dropdown([], label="Layer of the table by token", interactive=True)
            part = gr.Radio(["answer", "prompt"], value="answer", label="Tokens")
        by_layer, by_token = gr.HTML(_NOTHING_YET), gr.HTML()

        def answers(*values: Any) -> Iterator[tuple[str, str, Answer | None]]:  # gradio asks for a generator function
            yield "", "", None  # no earlier answer beside this question, whatever becomes of it
            yield from _answers(answerer, *values)

        # Those of an earlier answer are not this one's.
        start.click(lambda: (None, _NOTHING_YET, ""), None, [given, by_layer, by_token], queue=False)
        run = start.click(answers, [prompt, template, *sampling], [adapted, plain, given], concurrency_limit=1)
        shown = [given, experts, kind, layer, part], [by_layer, by_token]
        look = run.success(lambda answer: _look(answerer, answer), [given], [experts, kind, layer])
        look.success(_tables, *shown)
        stop.click(None, cancels=[run])
        for control in (kind, layer, part):
            control.input(_tables, *shown)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> str:
    """Start to serve a page; returns its address at once."""
    theme = gr.themes.Default(font=_FONT, font_mono=_FONT_MONO)
    _, url, _ = page.queue().launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=theme,
        ssr_mode=False,
    )
    return url


def _sampling(max_new_tokens: int) -> list[Any]:
    with gr.Accordion("Sampling", open=False), gr.Row():
        return [
            gr.Slider(1, max(max_new_tokens, 1024), max_new_tokens, step=1, label="max_new_tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="temperature", info="0 is greedy"),
            gr.Slider(0.05, 1, 1, step=0.05, label="top_p", info="1 keeps all tokens"),
            gr.Number(0, precision=0, minimum=0, label="top_k", info="0 keeps all tokens"),
            gr.Number(0, precision=0, minimum=0, label="seed"),
        ]


def _answers(
    answerer: Answerer,
    text: str,
    template: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int | None,
) -> Iterator[tuple[str, str, Answer | None]]:
    """Both answers, growing, and the one with the adapter when it is complete."""
    # A field that was emptied is None.
    decoding: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "seed": None if seed is None else int(seed)}
    if temperature > 0:
        decoding |= {"temperature": temperature, "top_p": top_p, "top_k": int(top_k or 0) or None}
    else:
        decoding["do_sample"] = False
    try:
        if not (text or "").strip():
            raise MolaError("`instruction` must hold some text: got none. Write one.")
        decoding["before_answer"] = template != _AS_IT_IS
        if decoding["before_answer"]:
            decoding["template"] = answerer.template(template)
            text = decoding["template"].prompt(text, "")
        prompt = text
        adapted = plain = Answer("", [], 0)
        for adapted in answerer.answer(prompt, with_adapter=True, **decoding):
            yield adapted.text, "", None
        for plain in answerer.answer(prompt, with_adapter=False, **decoding):
            yield adapted.text, plain.text, None
        yield adapted.text, plain.text, adapted
    except MolaError as error:
        raise gr.Error(str(error)) from error


def _look(answerer: Answerer, answer: Answer) -> tuple[tuple[Answer, Experts], Any, Any]:
    """The experts with the answer that they are of, and what can be chosen."""
    experts = answerer.experts(answer)
    kinds = list(dict.fromkeys(_kinds(experts).values()))
    layers = list(dict.fromkeys(module.layer_index for module in experts.modules if module.layer_index is not None))
    return (
        (answer, experts),
        gr.Dropdown(kinds, value=kinds[0] if kinds else None),
        gr.Dropdown(layers, value=layers[-1] if layers else None),
    )


def _kinds(experts: Experts) -> dict[str, str]:
    return module_kinds(module.module for module in experts.modules)


def _tables(
    given: Answer | None, found: tuple[Answer, Experts] | None, kind: str | None, layer: int | None, part: str
) -> tuple[str, str]:
    """The tables by layer and by token; none of an answer that is not the given one any more."""
    if given is None or found is None or found[0] != given:
        return _NOTHING_YET, ""
    experts = found[1]
    kinds = _kinds(experts)
    modules = [module for module in experts.modules if kinds[module.module] == kind]
    if not modules:
        return _NO_ROUTERS, ""
    prompt = experts.num_prompt_tokens
    shown = slice(prompt, None) if part == "answer" else slice(0, prompt)
    of_layer = [module for module in modules if module.layer_index == layer]
    return layers_table(modules, shown), "".join(tokens_table(each, experts.tokens, shown) for each in of_layer)
