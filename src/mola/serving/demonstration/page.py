"""The page of `mola demo`: prompt, sampling values, both answers side by side, and the experts behind one of them."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from mola.architecture.layer_names import module_kinds
from mola.data.templates import template_names
from mola.errors import MolaError
from mola.insight.recorder import ModuleGates
from mola.serving.demonstration.answering import Answer, Answerer, Experts

_NO_TEMPLATE = "none: the text as it is"
_OWN_TEMPLATE = "the one of the skill's training"
_NO_ANSWER_YET = "<p>After an answer this shows which experts computed it.</p>"
_ABOUT_EXPERTS = (
    "The tables show the answer with the adapter. Experts are numbered within their module: "
    "expert 1 of one layer has nothing to do with expert 1 of another."
)
_NO_ROUTERS = "<p>No module of this adapter has a router: it is no mixture of experts.</p>"
# Installed fonts: the page loads none from other servers.
_THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def build_page(answerer: Answerer, base_model: str, template: str | None, max_new_tokens: int) -> gr.Blocks:
    """The page with its controls and their actions; the controls begin with this template and `max_new_tokens`.

    Without a template, they begin with the one of the skill that answers.
    """
    with gr.Blocks(title="mola", analytics_enabled=False) as page:
        kind = "adapter" if answerer.skills is None else "skills"
        gr.Markdown(f"# mola\nBase model `{base_model}`, {kind} `{answerer.adapter}`")
        prompt = gr.Textbox(label="Instruction", lines=3, autofocus=True)
        choices = [*([] if answerer.skills is None else [_OWN_TEMPLATE]), *template_names(), _NO_TEMPLATE]
        chosen_template = gr.Dropdown(choices, value=template or _OWN_TEMPLATE, label="Template")
        sampling = _sampling_controls(max_new_tokens)
        with gr.Row():
            start, stop = gr.Button("Answer", variant="primary"), gr.Button("Stop")
        with gr.Row():
            adapted = gr.Textbox(label=f"With the {kind}", lines=8, buttons=["copy"])
            plain = gr.Textbox(label="Base model alone", lines=8, buttons=["copy"])
        answer = gr.State(None)  # the complete answer with the adapter

        def generate(*values: Any) -> Iterator[tuple[Any, str, Answer | None]]:  # gradio needs a generator function
            yield "", "", None  # clear the earlier answers, even if this question is refused
            yield from _answers(answerer, *values)

        generation = generate, [prompt, chosen_template, *sampling], [adapted, plain, answer]
        if answerer.skills is None:
            run = _add_experts(answerer, start, generation, answer)
        else:
            run = start.click(*generation, concurrency_limit=1)
        stop.click(None, cancels=[run])
    return page


def _add_experts(answerer: Answerer, start: gr.Button, generation: tuple[Any, ...], answer: gr.State) -> Any:
    """The part of the page about the experts behind an answer: its controls and their actions.

    Returns:
        The run of `generation` (function, inputs, outputs), which clears the tables of the earlier answer first.
    """
    answer_with_experts = gr.State(None)
    gr.Markdown(f"## Experts\n{_ABOUT_EXPERTS}")
    with gr.Row():
        kind = gr.Dropdown([], label="Module", interactive=True)
        layer = gr.Dropdown([], label="Layer of the table by token", interactive=True)
        part = gr.Radio(["answer", "prompt"], value="answer", label="Tokens")
    by_layer, by_token = gr.HTML(_NO_ANSWER_YET), gr.HTML()
    # One after the other: of two actions of one click, gradio may begin the second when the first has ended.
    clear = start.click(lambda: (None, _NO_ANSWER_YET, ""), None, [answer, by_layer, by_token], queue=False)
    run = clear.then(*generation, concurrency_limit=1)
    tables = [answer, answer_with_experts, kind, layer, part], [by_layer, by_token]
    find_experts = run.success(
        lambda answer: _find_experts(answerer, answer), [answer], [answer_with_experts, kind, layer]
    )
    find_experts.success(_tables, *tables)
    for control in (kind, layer, part):
        control.input(_tables, *tables)
    return run


def launch(page: gr.Blocks, host: str, port: int) -> str:
    """Start to serve a page on other threads; returns its address."""
    _, url, _ = page.queue().launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=_THEME,
        ssr_mode=False,
    )
    return url


def _sampling_controls(max_new_tokens: int) -> list[Any]:
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
    template_name: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int | None,
) -> Iterator[tuple[Any, str, Answer | None]]:
    """Yield both growing answers; at the end also the complete answer with the adapter.

    Of a model with skills, the first answer is a text box that says who answers. An emptied number field is None.
    """
    decoding: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "seed": None if seed is None else int(seed)}
    if temperature > 0:
        decoding |= {"temperature": temperature, "top_p": top_p, "top_k": int(top_k or 0) or None}
    else:
        decoding["do_sample"] = False
    try:
        if not (text or "").strip():
            raise MolaError("`instruction` must hold some text: got none. Write one.")
        prompt, skill = text, answerer.ask(text)
        decoding["before_answer"] = template_name != _NO_TEMPLATE
        if template_name != _NO_TEMPLATE:
            decoding["template"] = answerer.template(None if template_name == _OWN_TEMPLATE else template_name, skill)
            prompt = decoding["template"].prompt(text, "")
        adapted = plain = Answer("", [], 0)

        def shown(answer: Answer) -> Any:
            if answerer.skills is None:
                return answer.text
            return gr.Textbox(answer.text, label="No skill knows this" if skill is None else f"Skill {skill}")

        for adapted in answerer.answer(prompt, with_adapter=True, skill=skill, **decoding):
            yield shown(adapted), "", None
        for plain in answerer.answer(prompt, with_adapter=False, **decoding):
            yield shown(adapted), plain.text, None
        yield shown(adapted), plain.text, adapted
    except MolaError as error:
        raise gr.Error(str(error)) from error


def _find_experts(answerer: Answerer, answer: Answer) -> tuple[tuple[Answer, Experts], Any, Any]:
    """The answer with its experts, and the kinds of modules and the layers that the user can choose."""
    experts = answerer.experts(answer)
    kinds = list(dict.fromkeys(_kinds(experts).values()))
    layers = list(dict.fromkeys(module.layer_index for module in experts.modules if module.layer_index is not None))
    return (
        (answer, experts),
        gr.Dropdown(kinds, value=kinds[0] if kinds else None),
        gr.Dropdown(layers, value=layers[-1] if layers else None),
    )


def _kinds(experts: Experts) -> dict[str, str]:
    """Name of each module -> its kind, such as `q_proj`."""
    return module_kinds(module.module for module in experts.modules)


def _tables(
    answer: Answer | None,
    answer_with_experts: tuple[Answer, Experts] | None,
    kind: str | None,
    layer: int | None,
    part: str,
) -> tuple[str, str]:
    """The tables by layer and by token of the answer on the page, as HTML."""
    if answer is None or answer_with_experts is None or answer_with_experts[0] != answer:
        return _NO_ANSWER_YET, ""  # the experts are those of an earlier answer
    experts = answer_with_experts[1]
    kinds = _kinds(experts)
    modules = [module for module in experts.modules if kinds[module.module] == kind]
    if not modules:
        return _NO_ROUTERS, ""
    num_prompt_tokens = experts.num_prompt_tokens
    tokens = slice(num_prompt_tokens, None) if part == "answer" else slice(0, num_prompt_tokens)
    of_layer = [module for module in modules if module.layer_index == layer]
    by_token = "".join(tokens_table(module, experts.tokens, tokens) for module in of_layer)
    return layers_table(modules, tokens), by_token


# ---------------------------------------------------------------------- gates as HTML tables, without a style sheet

# A share of the page's text colour is legible on light and on dark pages.
_CELL = "padding:2px 8px;text-align:right;background:color-mix(in srgb,currentColor {shade}%,transparent)"
_MAX_SHADE = 45  # per cent; the number stays legible on this shade


def layers_table(modules: Sequence[ModuleGates], tokens: slice) -> str:
    """Mean gate of each expert over some tokens in per cent, with one row per layer, for modules of one kind."""
    rows = []
    for module in modules:
        counted = module.gates[tokens]
        mean = counted.mean(0) if len(counted) else counted.new_zeros(counted.shape[1])
        layer = module.module if module.layer_index is None else str(module.layer_index)
        rows.append((html.escape(layer), mean.tolist()))
    return _gates_table("Mean gate of each expert, by layer, per cent", "layer", rows)


def tokens_table(module: ModuleGates, tokens: Sequence[str], shown: slice) -> str:
    """Gates of one module in per cent, with one row for each of the shown tokens."""
    texts = (f"<code>{html.escape(text)}</code>" for text in tokens[shown])
    rows = list(zip(texts, module.gates[shown].tolist(), strict=True))
    return _gates_table(f"Gates of {module.module}, by token, per cent", "token", rows)


def _gates_table(caption: str, first_column: str, rows: Sequence[tuple[str, list[float]]]) -> str:
    """A table of rows with a heading (HTML) and the gates of one or more experts."""
    width = max((len(gates) for _, gates in rows), default=0)
    columns = (first_column, *(f"expert {expert}" for expert in range(width)))
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{heading}</th>{"".join(map(_cell, gates))}'
        f"{'<td></td>' * (width - len(gates))}</tr>"
        for heading, gates in rows
    )
    caption = f'<caption style="text-align:left">{html.escape(caption)}</caption>'
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div style="overflow-x:auto" tabindex="0">{table}</div>'  # a wide table scrolls sideways, also by keyboard


def _cell(gate: float) -> str:
    if gate == 0:
        return '<td style="padding:2px 8px;text-align:right">·</td>'
    return f'<td style="{_CELL.format(shade=round(_MAX_SHADE * gate))}">{100 * gate:.0f}</td>'
