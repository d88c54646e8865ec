"""The page on a port of this machine, which asks nothing of any other."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
import webbrowser
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from unperturb.serving.limits import Limits
from unperturb.serving.server import in_background, is_loopback, server_for

if TYPE_CHECKING:
    import socket

    import uvicorn

# Read when these libraries are imported: nothing is reported, fetched or looked up.
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# The browser is told to load nothing from elsewhere, whatever the page's libraries would like.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'"


def run_app(
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = True,
    device: str = "auto",
    show: Callable[[object], None] = print,
) -> None:
    """Show the playground until SIGINT or SIGTERM, which are raised again. See docs/app.md.

    port: 0 takes a free one. open_browser: whether the page is opened here. device: where the models work. show: is
    told where the page is.

    Raises `ImportError` without the extra `app`; `FileNotFoundError` where there is no zoo; `ValueError` for an address
    that cannot be had.
    """
    with _prepared(host, port, device) as (server, listening, url):
        if not is_loopback(host):
            show(f"note: whoever reaches {host} may use this page, and this machine's time")
        show(f"the playground is at {url}. Stop it with Ctrl-C")
        if open_browser:
            webbrowser.open(url)
        server.run(sockets=[listening])


@contextlib.contextmanager
def running(*, device: str = "auto") -> Iterator[str]:
    """Inside: the playground, by a thread of this program, on a free port of 127.0.0.1; yields the URL. Errors are
    those of `run_app`."""
    with _prepared("127.0.0.1", 0, device) as (server, listening, url), in_background(server, listening, url):
        yield url


@contextlib.contextmanager
def _prepared(host: str, port: int, device: str) -> Iterator[tuple[uvicorn.Server, socket.socket, str]]:
    """(a server that has not begun, the socket that it is to listen on, its URL); what was uploaded goes with it."""
    with tempfile.TemporaryDirectory(prefix="unperturb-app-") as folder, _environment(folder):
        _libraries()
        from unperturb.devices import pick_device

        # An open page holds its connection for as long as it is open.
        yield server_for(create_app(str(pick_device(device))), host, port, patience=2)


def create_app(device: str = "cpu", limits: Limits | None = None) -> Callable[..., Any]:
    """The ASGI app of the page. limits: on what is uploaded. Raises as `run_app` does."""
    import gradio as gr
    from fastapi import FastAPI

    from unperturb.app.page import CSS, build

    limits = limits or Limits()
    app = FastAPI(openapi_url=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gr.mount_gradio_app(
            app,
            build(device),
            path="/",
            max_file_size=limits.max_bytes,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=False,
            theme=gr.themes.Default(primary_hue="blue").set(block_info_text_color="*neutral_600"),
            css=CSS,
        )
    return _alone(app)


def _alone(app: Any) -> Callable[..., Any]:
    """`app`, whose answers tell the browser to ask nobody else."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await app(scope, receive, sending if scope["type"] == "http" else send)

    return answer


@contextlib.contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Inside, the libraries stay offline, and keep what is sent to them in `folder`."""
    wanted = {**OFFLINE, "GRADIO_TEMP_DIR": folder}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _libraries() -> None:
    try:
        import gradio  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; for the playground: pip install "unperturb[app]"') from error
