"""A service on a port of this machine, until it is stopped."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.defenses import Protected
from unperturb.devices import pick_device
from unperturb.serving.inference import image_shape
from unperturb.serving.limits import Limits

if TYPE_CHECKING:
    import uvicorn

TOKEN = "UNPERTURB_TOKEN"


def serve(
    model: Protected,
    *,
    name: str = "model",
    size: int | None = None,
    channels: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    token: str | None = None,
    device: str = "auto",
    show: Callable[[object], None] = print,
) -> None:
    """Answer HTTP requests with `model` until SIGINT or SIGTERM, which are raised again once all that was taken is
    answered. See docs/serve.md.

    model: moved to `device`, in eval mode. name: what `/info` calls it. size, channels: of its images, where it does
    not know them: the side that pictures are resized to, and 1 (grey) or 3. port: 0 takes a free one. limits:
    `unperturb.serving.Limits`. token: what clients have to send, if anything. show: is told where the service is.

    Raises `ImportError` without the extra `serve`; `ValueError` for a model that fails on such images, a token that
    cannot be sent, or an address that cannot be had.
    """
    server, listening, url = _prepared(model, name, size, channels, host, port, limits, token, device)
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
    if token is None and not is_loopback(host):
        show(f"note: whoever reaches {host} may use this service; --token-file asks for a token")
    show(f"{name} at {url}; what it takes: {url}/docs. Stop it with Ctrl-C")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about pictures that are refused: a client could fill the log
        server.run(sockets=[listening])


@contextlib.contextmanager
def running(
    model: Protected,
    *,
    name: str = "model",
    size: int | None = None,
    channels: int | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    device: str = "auto",
) -> Iterator[str]:
    """Inside: `model` is served by a thread of this program, on a free port of 127.0.0.1; yields the URL. After: all
    that was taken is answered, and the service has ended. Arguments and errors are those of `serve`."""
    server, listening, url = _prepared(model, name, size, channels, "127.0.0.1", 0, limits, token, device)
    with in_background(server, listening, url):
        yield url


@contextlib.contextmanager
def in_background(server: uvicorn.Server, listening: socket.socket, url: str) -> Iterator[None]:
    """Inside: `server` answers, by a thread of this program, on the socket `listening`, which is at `url`. After: it
    has ended. Raises `RuntimeError` where it does not start."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="unperturb-server", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    if not server.started:
        raise RuntimeError(f"the service at {url} did not start; the log says why")
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def read_token(file: Path | None) -> str | None:
    """The token in `file`, or in $UNPERTURB_TOKEN where no file is given; None where neither is.

    Raises `ValueError` for one that is empty, or that no header could carry.
    """
    where = TOKEN if file is None else str(file)
    text = os.environ.get(TOKEN) if file is None else file.read_text(encoding="utf-8", errors="replace")
    return None if text is None else _checked(text.strip(), where)


_log = logging.getLogger("unperturb.serving")


def _checked(token: str, where: str) -> str:
    if not token or not all("!" <= c <= "~" for c in token):
        raise ValueError(
            f"{where} holds no token: expected one word of ASCII letters, digits and signs, such as "
            "python -c 'import secrets; print(secrets.token_urlsafe())' gives"
        )
    return token


def _prepared(
    model: Protected,
    name: str,
    size: int | None,
    channels: int | None,
    host: str,
    port: int,
    limits: Limits | None,
    token: str | None,
    device: str,
) -> tuple[uvicorn.Server, socket.socket, str]:
    """(a server that has not begun, the socket that it is to listen on, its URL)."""
    _libraries()
    from unperturb.serving.app import Served, create_app

    if not isinstance(model, Protected):
        raise TypeError(f"serve takes a unperturb.Protected(classifier, purifier), not {type(model).__name__}")
    limits = limits or Limits()
    shape = image_shape(model, size, channels)
    where = pick_device(device)
    token = None if token is None else _checked(token, "token")
    app = create_app(Served(model.to(where).eval(), name, shape, where, limits, token))
    # Each request ends within its timeout; what the model is busy with then is not waited for.
    return server_for(app, host, port, patience=math.ceil(limits.timeout) + 5)


def server_for(app: Any, host: str, port: int, *, patience: int) -> tuple[uvicorn.Server, socket.socket, str]:
    """(a server of the ASGI `app` that has not begun, the socket that it is to listen on, its URL).

    patience: seconds that it waits for open connections when it ends. Raises as `listen` does.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=patience,
    )
    listening, url = listen(host, port)
    return uvicorn.Server(config), listening, url


def _libraries() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; to serve: pip install "unperturb[serve]"') from error


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """(a socket that listens there, its URL). port: 0 takes a free one. Raises `ValueError` where it cannot be had."""
    if not 0 <= port <= 65_535:
        raise ValueError(f"port must be from 0 (a free one) to 65535, not {port}")
    listening = None
    try:
        # With its protocol, which asyncio looks at: else small answers wait 40 ms for the last one's receipt.
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ValueError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose others with --host and --port; port 0 "
            "takes a free one"
        ) from error
    place = f"[{host}]" if ":" in host else host
    return listening, f"http://{place}:{listening.getsockname()[1]}"


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
