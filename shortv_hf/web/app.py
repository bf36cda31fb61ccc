"""The page: what is where, and which of the `actions` a click starts. Only this file knows Gradio.

Everything that needs the model goes through one queue, one user at a time; settings are checked beside it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import views
from .actions import Actions, note
from .examples import write_examples
from .options import ABOUT, NONE, Option, options_of
from .session import Sessions
from .shared import SharedModel
from .uploads import MAX_VIDEO_BYTES


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
try:
    import gradio as gr
except ImportError as error:
    raise ValueError(
        f"the demo in the browser needs the extra: pip install '.[cli,demo]' in its checkout ({error})"
    ) from None


MAX_WAITING = 16  # questions in the queue
SWEEP, KEEP = 600, 3600  # seconds: how often uploads are looked through, and how old they get
FONTS = ["system-ui", "sans-serif"]  # of the reader's machine: none is fetched
CSS = """
#costs .costs { width: 100%; border: 0; border-collapse: collapse; table-layout: fixed; }
.costs th, .costs td { text-align: left; border: 0; vertical-align: top; padding: 4px 8px; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary); }
.costs td { white-space: pre-wrap; }
#costs table, #costs thead, #costs tbody, #costs tr { border: 0 !important; }
.status { min-height: 1.5em; overflow-wrap: anywhere; }
.failed { color: var(--error-text-color, #b91c1c); font-weight: 600; }
#layers img, #patches img { background: white; }
#chat button[aria-label="Share"] { display: none; } /* it would send the picture to another machine */
#examples img { max-height: 56px; max-width: 56px; }
"""
INTRO = """# ShortV: which visual tokens does a model really compute?
A picture becomes visual tokens, and every decoder layer computes them. **ShortV** freezes them in the layers where that
changes next to nothing (grey in the chart): only text is computed there. Ask about a picture, then move the slider and ask again.
"""


def build(sessions: Sessions, is_demonstration_model: bool = False, max_waiting: int = MAX_WAITING) -> Any:
    """The page for the sessions' model, as a `gradio.Blocks` with its queue; [`serve`] starts it.

    Args:
        is_demonstration_model: whether to say what it knows.
        max_waiting: questions in the queue; the next one is refused.
    """
    shared, config = sessions.shared, sessions.shared.model.config
    given = shared.start.reduction
    first_chart, first_text = _first_chart(shared)
    controls: dict[str, dict[str, Any]] = {}  # method → option → component
    methods = [name for name in ABOUT if name != NONE]

    with gr.Blocks(title="ShortV", fill_width=True, analytics_enabled=False, delete_cache=(SWEEP, KEEP)) as page:
        gr.Markdown(INTRO + _about(is_demonstration_model))
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation", elem_id="chat", height=360, render_markdown=False, sanitize_html=True,
                    buttons=[], allow_tags=False, allow_file_downloads=False, placeholder="Add a picture below, ask, and press Enter.",
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    label="Your question", elem_id="question", file_count="multiple",
                    file_types=["image", "video"] if shared.takes_video else ["image"],
                    placeholder="Ask about the pictures…", submit_btn="Ask", stop_btn=False, max_plain_text_length=10**6,
                )  # fmt: skip
                status = gr.HTML(note("Ready."), elem_id="status")
                with gr.Row():
                    compare = gr.Button(
                        "Compare with dense", elem_id="compare", variant="primary", size="sm", min_width=150
                    )
                    stop = gr.Button("Stop", elem_id="stop", size="sm", min_width=80)
                    new = gr.Button("New conversation", elem_id="new", size="sm", min_width=150)
                costs = gr.HTML("", elem_id="costs")
                with TemporaryDirectory() as folder:  # Gradio keeps copies
                    examples = gr.Examples(
                        write_examples(Path(folder)), box, label="Examples, ready to click", elem_id="examples",
                        cache_examples=False,
                    )  # fmt: skip
            with gr.Column(scale=3, min_width=320):
                number = gr.Slider(
                    0, max(len(shared.order), 1), len(shared.start.layers), step=1, elem_id="layers-slider",
                    label="Frozen layers", info=f"The most ineffective first: {_order(shared)}.", interactive=bool(shared.order),
                )  # fmt: skip
                method = gr.Dropdown(
                    [NONE, *methods], value=NONE if given is None else given["method"], elem_id="method",
                    label="Token reduction", info="Takes visual tokens out; frozen ones stay.",
                )  # fmt: skip
                about = gr.Markdown(ABOUT[method.value])
                groups = []
                for name in methods:
                    with gr.Group(visible=name == method.value) as group:
                        controls[name] = {option.name: _control(option) for option in options_of(name, config, given)}
                    groups.append(group)
                always = gr.Checkbox(True, label="Compare with the dense model after each answer", elem_id="always")
                layers_text = gr.HTML(note(first_text), elem_id="layers-text")
                layers = gr.Image(
                    first_chart, show_label=False, label="Layers and tokens", elem_id="layers", format="png", interactive=False,
                    buttons=[], alt_text="One column per layer: which tokens it computes",
                )  # fmt: skip
                patches = gr.Image(
                    show_label=False, label="What happens to the picture's patches", elem_id="patches", format="png", interactive=False,
                    visible=False, buttons=[], alt_text="The first picture; greyed patches have left the model",
                )  # fmt: skip

        settings = [number, method, *(each for own in controls.values() for each in own.values())]
        actions = Actions(sessions, {name: list(own) for name, own in controls.items()})
        parts = {
            "chat": chat, "box": box, "status": status, "layers": layers, "layers_text": layers_text, "patches": patches,
            "costs": costs,
        }  # fmt: skip

        def shown(found: dict[str, Any]) -> dict:
            if "patches" in found:
                found |= {"patches": gr.update(value=found["patches"], visible=found["patches"] is not None)}
            return {parts[name]: value for name, value in found.items()}

        def ask(request: gr.Request, message: dict, history: list, compare_too: bool, *values: Any) -> Iterator[dict]:
            for found in actions.ask(request.session_hash, message, history, compare_too, values):
                yield shown(found)

        def compare_again(request: gr.Request, *values: Any) -> Iterator[dict]:
            for found in actions.compare(request.session_hash, values):
                yield shown(found)

        def changed(request: gr.Request, *values: Any) -> dict:
            return shown(actions.changed(request.session_hash, values))

        def show_options(name: str) -> list:
            return [ABOUT[name], *(gr.update(visible=name == each) for each in methods)]

        def start_anew(request: gr.Request) -> dict:
            return shown(actions.start_anew(request.session_hash))

        def stopped(request: gr.Request) -> None:
            sessions.get(request.session_hash).stop()

        def left(request: gr.Request) -> None:
            sessions.close(request.session_hash)

        model_queue: dict = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        beside: dict = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        asking = {"inputs": [box, chat, always, *settings], "outputs": [*parts.values()]}
        box.submit(ask, **asking, show_progress="minimal", **model_queue)
        examples.load_input_event.then(ask, **asking, show_progress="minimal", **model_queue)
        compare.click(compare_again, settings, [status, costs], show_progress="minimal", **model_queue)
        method.change(show_options, method, [about, *groups], **beside)
        for component in settings:
            component.change(changed, settings, [layers, layers_text, status], trigger_mode="always_last", **beside)
        stop.click(stopped, **beside)
        for emptied in (new.click, chat.clear):
            emptied(start_anew, None, [chat, box, costs, patches, status], **beside)
        page.unload(left)
    page.queue(max_size=max_waiting, default_concurrency_limit=1, api_open=False)
    return page


def serve(page: Any, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> str:
    """Serve the page, until it is interrupted or, without `wait`, `page.close()`. Returns its address."""
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, max_file_size=MAX_VIDEO_BYTES, footer_links=[], css=CSS,
        theme=_theme(), ssr_mode=False, pwa=False, mcp_server=False,
        enable_monitoring=False, prevent_thread_lock=not wait, quiet=not wait,
    )  # fmt: skip
    return address


def _theme() -> Any:
    """Gradio's own, without its fonts, and with explanations that can be read."""
    return gr.themes.Default(font=FONTS, font_mono=["monospace"]).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )


def _control(option: Option) -> Any:
    if option.low is not None:
        return gr.Slider(option.low, option.high, option.value, step=option.step, label=option.name)
    return gr.Textbox(option.text, label=option.name, max_lines=1)


def _order(shared: SharedModel) -> str:
    shown = ", ".join(map(str, shared.order[:12])) or "none is known; start with --layers"
    return f"{shown}{', …' if len(shared.order) > 12 else ''} ({shared.order_from})"


def _about(is_demonstration_model: bool) -> str:
    if not is_demonstration_model:
        return ""
    return (
        "The demonstration model is tiny: it knows six colours and four shapes on a plain ground, in one picture, and nothing "
        "else. Photographs get answers that mean nothing. It is too small to get faster: look at its FLOPs."
    )


def _first_chart(shared: SharedModel) -> tuple[Any, str]:
    try:
        return views.frozen_layers(shared, shared.start, None)
    except ValueError:
        return None, "How many tokens stay depends on the picture: ask about one."
