"""The playground as a page on this machine: gradio's components, which nothing outside of it can reach.

gradio is an extra and is imported inside the functions. It would report its use and look for newer versions, and its
pages may name fonts and scripts of other hosts: the first is switched off, the second refused by a header that browsers
obey. Uploaded images are in a folder that is removed when the page ends.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import VitrimError
from ..measure.accelerator import make_accelerator
from ..text import message, printable, reason_of
from . import choices
from .choices import Choice
from .playground import Figures, Subject, figures, sight

HOST = "127.0.0.1"
_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
_ONE = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
"""Of every event: one at a time, so that no time is measured while something else is computed."""


def serve(spec: str, *, port: int, image_size: int | None = None, device: str = "auto") -> None:
    """Open the model and serve the page until the process is interrupted.

    Args:
        spec: the first model, as the commands take it.
        port: 0 takes any that is free.
        image_size: side of square images in pixels; by default each model's own.
        device: "cpu", "cuda", or "auto": CUDA if there is one.

    Raises:
        VitrimError: gradio is missing, the port is in use, or the model cannot be opened.
    """
    with running(spec, port=port, image_size=image_size, device=device) as (server, place):
        print(f"http://{HOST}:{place.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        server.run([place])


@contextmanager
def running(
    spec: str, *, port: int, image_size: int | None = None, device: str = "auto"
) -> Iterator[tuple[Any, socket.socket]]:
    """A server that is ready to run, and the socket that it listens on; port 0 takes any that is free."""
    with _environment(), _listening(port) as place:
        _check_installed()
        import uvicorn

        app = _application(spec, image_size, make_accelerator(cpu=device == "cpu").device)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        yield uvicorn.Server(config), place


@contextmanager
def _environment() -> Iterator[None]:
    """Within this context gradio sends nothing, and keeps files in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="vitrim-", ignore_cleanup_errors=True) as folder:
        variables = {**_QUIET, "GRADIO_TEMP_DIR": folder}
        before = {name: os.environ.pop(name) for name in variables if name in os.environ}
        os.environ |= variables
        try:
            yield
        finally:
            for name in variables:
                os.environ.pop(name, None)
            os.environ |= before


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((HOST, port))
            place.listen()
        except OSError as error:
            reason = (error.strerror or "it cannot be opened").lower()
            raise VitrimError(f"port {port} of this machine: {reason}; choose another --port") from None
        yield place


def _check_installed() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise VitrimError("gradio is not installed; run: pip install 'vitrim[app]'") from None


def _application(spec: str, image_size: int | None, device: torch.device) -> Any:
    """The page as an ASGI application that answers only to names of this machine."""
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    app.add_middleware(_Policy)  # pyright: ignore[reportArgumentType]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return gradio.mount_gradio_app(
        app, _page(spec, image_size, device), path="/", server_name=HOST, footer_links=[], run_history=False,
        show_error=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False, theme=_theme(),
        max_file_size="100mb",
    )  # fmt: skip


class _Policy:
    """Adds the header by which a browser loads nothing from other hosts."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def send_with_policy(part: MutableMapping[str, Any]) -> None:
            if part["type"] == "http.response.start":
                part["headers"] = [*part["headers"], (b"content-security-policy", _POLICY)]
            await send(part)

        await self.app(scope, receive, send_with_policy)


def _theme() -> Any:
    import gradio

    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _page(spec: str, image_size: int | None, device: torch.device) -> Any:
    import gradio as gr

    opened = lru_cache(maxsize=1)(lambda name: Subject.open(name, image_size, device))
    first = opened(spec).first_choice()

    def look(name: str, file: str | None, *chosen: Any) -> list[Any]:
        """All outputs: score, line, picture, before, after, table."""
        choice = Choice(*chosen)
        score = gr.skip()
        try:
            known = choices.scores(choice.reducer)
            score = gr.Dropdown(known, value=choices.fitting(choice.reducer, choice.score), interactive=bool(known))
            subject = opened(name.strip())
            if file is None:
                return [score, "drop in an image", None, None, None, figures(subject, choice).markdown()]
            seen = sight(subject, file, choice)
            line = message("\n".join([seen.method, *seen.remarks]))
            table = figures(subject, choice).markdown()
            return [score, line, seen.picture, seen.before or None, seen.after or None, table]
        except Exception as error:
            return [score, _line(error, file), None, None, None, ""]

    def measure(name: str, file: str | None, *chosen: Any) -> Any:
        """The table with times; nothing new where `look` has shown an error, or there is no image yet."""
        if file is None:
            return gr.skip()
        try:
            found: Figures = figures(opened(name.strip()), Choice(*chosen), timed=True)
        except Exception:
            return gr.skip()
        return found.markdown()

    with gr.Blocks(analytics_enabled=False, title="vitrim playground", fill_width=True) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="image", type="filepath", height=110)
                name = gr.Dropdown(choices.models(spec), value=spec, label="model", allow_custom_value=True)
                reducer = gr.Dropdown(choices.reducers(), value=first.reducer, label="reducer")
                scores = choices.scores(first.reducer)
                # gradio compares values with a list that may be older than they are; `choices` compares them anyway.
                score = gr.Dropdown(
                    scores, value=first.score, label="score", interactive=bool(scores), allow_custom_value=True
                )
                shape = gr.Dropdown(choices.shapes(), value=first.shape, label="schedule")
                macs = gr.Slider(0.2, 0.95, value=first.macs, step=0.05, label="share of the MACs that is kept")
            with gr.Column(scale=3):
                line = gr.Textbox(label="method", lines=1, max_lines=4, interactive=False)
                picture = gr.Image(label="tokens", format="png", interactive=False, buttons=["download", "fullscreen"])
                with gr.Row():
                    with gr.Column(scale=2, min_width=420):
                        table = gr.Markdown(container=True)
                    before = gr.Label(label="prediction with all tokens", show_heading=False)
                    after = gr.Label(label="prediction with fewer tokens", show_heading=False)
        given = [name, file, reducer, score, shape, macs]
        changes = [file.change, name.input, reducer.input, score.input, shape.input, macs.release, page.load]
        event = gr.on(
            changes, look, given, [score, line, picture, before, after, table], trigger_mode="always_last", **_ONE
        )
        event.then(measure, given, table, show_progress="hidden", **_ONE)
    return page


def _line(error: Exception, file: str | None) -> str:
    """One line about whatever went wrong; the image is called as its owner calls it, without our folder."""
    if isinstance(error, VitrimError):
        folder = f"{Path(file).parent}{os.sep}" if file else ""
        return message(str(error).strip().splitlines()[0].replace(folder, ""))
    return printable(f"{type(error).__name__}: {reason_of(error)}")
