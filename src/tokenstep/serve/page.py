"""The page of `tokenstep demo`: a form, its events, and the server; Gradio is used here alone."""

import html
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import gradio as gr
import uvicorn
from fastapi import FastAPI

from tokenstep.errors import TokenstepError
from tokenstep.serve.demo import MAX_MEGABYTES, MAX_PIXELS, Demo, knob_of, promise, show

KEPT = 3600  # seconds that uploads and results stay on the disk
WAITING = 20  # requests that may wait for their turn; further ones are told to come back

_CSS = """
.fault {border: 2px solid #a40000; border-radius: 6px; padding: 10px 14px; font-weight: 600;}
.html-container {padding: 0 !important;}
#figures table {width: auto;}
#figures :is(th, td) {padding: 4px 12px; white-space: nowrap;}
#figures :is(th, td) + :is(th, td) {text-align: right;}
"""


class _Form(NamedTuple):
    """What the user sets."""

    upload: gr.File
    model: gr.Radio
    knob: gr.Slider
    point: gr.HTML
    button: gr.Button


class _Answer(NamedTuple):
    """What a request fills, in this order."""

    message: gr.HTML
    results: gr.Column
    point: gr.HTML
    figures: gr.Markdown
    overlay: gr.Image
    dense: gr.Image
    tokens: gr.Image
    downloads: tuple[gr.DownloadButton, ...]

    def parts(self) -> list[Any]:
        """All of them in a row."""
        return [*self[:-1], *self.downloads]


def build(demo: Demo, start: str) -> gr.Blocks:
    """The page, with the model ``start`` chosen."""
    page = gr.Blocks(
        title="tokenstep demo", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)
    )
    with page:
        gr.Markdown(
            "# tokenstep\nSegmentation by a plain Vision Transformer that spends tokens only "
            "where the picture needs them (STEP), beside the same model dense."
        )
        form = _form(demo, start)
        _connect(demo, form, _answer())
    page.queue(max_size=WAITING)
    return page


def _form(demo: Demo, start: str) -> _Form:
    top, value = knob_of(demo.models[start])
    with gr.Row():
        with gr.Column(min_width=320):
            upload = gr.File(label="Picture", height=150, elem_id="upload")
            gr.Markdown(
                f"{_scales(demo)} Files over {MAX_MEGABYTES} MB or {MAX_PIXELS // 10**6} "
                "megapixels are refused, scale them down yourself. Nothing leaves the machine "
                "that serves this page."
            )
        with gr.Column(min_width=320):
            model = gr.Radio(list(demo.models), value=start, label="Model", elem_id="model")
            label = "Maximum loss, points of mIoU below the best that calibration found"
            knob = gr.Slider(0, top, value, step=0.1, label=label, buttons=[], elem_id="knob")
            point = gr.HTML(_point(demo, start, value), elem_id="point")
            button = gr.Button("Segment", variant="primary", elem_id="segment")
    return _Form(upload, model, knob, point, button)


def _scales(demo: Demo) -> str:
    """What happens to larger pictures."""
    sides = [(name, demo.side(name)) for name in demo.models]
    return " ".join(
        f"{name} takes pictures of any size as they are."
        if side is None
        else f"{name} takes pictures over {side} px scaled down to that long side."
        for name, side in sides
    )


def _answer() -> _Answer:
    message = gr.HTML(elem_id="message")
    with gr.Column(visible=False) as results:
        point = gr.HTML(elem_id="shown-point")
        figures = gr.Markdown(elem_id="figures")
        with gr.Row():
            overlay = _picture("STEP: the classes", "overlay")
            dense = _picture("Dense: the classes", "dense")
        with gr.Row():
            tokens = _picture("STEP: where the tokens went", "tokens")
            with gr.Column(min_width=320, elem_id="downloads"):
                names = ("Label map (PNG)", "Overlay (JPEG)", "Token map (JPEG)", "Report (JSON)")
                downloads = tuple(
                    gr.DownloadButton(f"Download: {name}", size="md") for name in names
                )
                gr.Markdown(
                    "The time is the model's own, without files, measured once on this one "
                    "picture; whatever else the machine does shows in it. What this picture loses "
                    "is not known, as it has no labels: the loss is that of the pictures that the "
                    "model was calibrated on. Shares under the classes are of the pixels, those "
                    "under the token map of its cells."
                )
    return _Answer(message, results, point, figures, overlay, dense, tokens, downloads)


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        elem_id=name,
        alt_text=label,
        interactive=False,
        min_width=320,
        buttons=["fullscreen"],
    )


def _connect(demo: Demo, form: _Form, answer: _Answer) -> None:
    """Say what happens on which event; whatever runs a model waits in one queue for its turn."""

    def choose(name: str) -> tuple[gr.Slider, str]:
        top, value = knob_of(demo.models[name])
        return gr.Slider(maximum=top, value=value), _point(demo, name, value)

    def turn(name: str, max_loss: float) -> str:
        return _point(demo, name, max_loss)

    def run(path: str | None, name: str, max_loss: float) -> Iterator[list[Any]]:
        yield from _run(demo, path, name, max_loss)

    quick: dict[str, Any] = {
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    form.knob.change(turn, [form.model, form.knob], form.point, **quick)
    chosen = form.model.input(choose, form.model, [form.knob, form.point], **quick)
    one_by_one: dict[str, Any] = {
        "inputs": [form.upload, form.model, form.knob],
        "outputs": answer.parts(),
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "api_visibility": "private",
    }
    upload, released = form.upload, form.knob.release
    gr.on([upload.upload, upload.clear, released, form.button.click], run, **one_by_one)
    chosen.then(run, **one_by_one)


def _run(demo: Demo, path: str | None, name: str, max_loss: float) -> Iterator[list[Any]]:
    """Fill the answer; a generator, since Gradio copies the files between a yield and the end."""
    nothing = [gr.Column(visible=False), "", "", *[None] * 7]  # 3 pictures, 4 downloads
    if path is None:
        yield ["Drop a picture on the field above.", *nothing]
        return
    with TemporaryDirectory(prefix="tokenstep-demo-") as out:
        try:
            shown = show(demo, Path(path), name=name, max_loss=max_loss, out=Path(out))
        except TokenstepError as fault:
            yield [_fault(str(fault)), *nothing]
            return
        point = html.escape(f"{name}, {shown.point}")
        pictures = shown.overlay, shown.dense_overlay, shown.tokens
        files = [str(file) for file in (*pictures, *shown.downloads)]
        yield ["", gr.Column(visible=True), point, shown.figures, *files]


def _point(demo: Demo, name: str, max_loss: float) -> str:
    try:
        return html.escape(promise(demo.models[name], max_loss))
    except TokenstepError as fault:
        return _fault(str(fault))


def _fault(message: str) -> str:
    """A fault as HTML; escaped, since it holds the name of a stranger's file."""
    return f'<div class="fault" role="alert">Cannot do this: {html.escape(message)}</div>'


def serve(demo: Demo, start: str, listening: socket.socket) -> None:
    """Serve the page on a socket, with the model ``start`` chosen, until interrupted."""
    with TemporaryDirectory(prefix="tokenstep-demo-") as folder, suppress(KeyboardInterrupt):
        # Where Gradio keeps uploads and results; here they are gone when the server is.
        os.environ["GRADIO_TEMP_DIR"] = folder
        # So a service manager's end is as Ctrl-C: uvicorn hands a signal on when it has stopped.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Gradio's own launch calls its server by way of whatever proxy the environment names.
        app = gr.mount_gradio_app(
            FastAPI(),
            build(demo, start),
            path="/",
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            show_error=False,
            max_file_size=f"{MAX_MEGABYTES}mb",
            theme=_theme(),
            css=_CSS,
        )
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
        uvicorn.Server(config).run(sockets=[listening])


def _theme() -> gr.themes.Base:
    """Gradio's own look with fonts of the system, since others might be asked of another host."""
    return gr.themes.Default(
        font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
    )
