"""The verbs that listen on a port: serve, app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unperturb.cli.options import Device, Threads, use_threads
from unperturb.cli.terminal import say


def serve(
    model: Annotated[
        str, typer.Argument(help="A purifier: a run folder, zoo:NAME or a name; or a saved Protected, which is both.")
    ],
    classifier: Annotated[
        str | None,
        typer.Option(help="What stands behind the purifier: a run folder, zoo:NAME, net.onnx, or module:object."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8000,
    size: Annotated[int | None, typer.Option(min=1, help="Side that pictures are resized to, if unknown.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, max=3, help="1 (grey) or 3, if unknown.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A token that clients must send (or $UNPERTURB_TOKEN).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that the model sees at once.")] = 32,
    wait_ms: Annotated[float, typer.Option(min=0, help="How long the first of a batch waits for others.")] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="Requests under way; what comes then is answered by 503.")] = 128,
    timeout: Annotated[float, typer.Option(help="Seconds to the answer of a request; then it is 504.")] = 10.0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request's body; above, it is 413.")] = 8_000_000,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture; above, it is 413.")] = 16_000_000,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Serve a protected model over HTTP: pictures in, classes and restored pictures out."""
    from unperturb.serving import Limits, load_protected
    from unperturb.serving import serve as run
    from unperturb.serving.server import read_token

    use_threads(threads)
    sizes = {"batch": batch, "queue": queue, "max_bytes": max_bytes, "max_pixels": max_pixels}
    limits = Limits(wait_ms=wait_ms, timeout=timeout, **sizes)
    name = model if classifier is None else f"{model} before {classifier}"
    where: dict[str, object] = {"host": host, "port": port, "device": device, "size": size, "channels": channels}
    protected = load_protected(model, classifier, size=size, channels=channels)
    run(protected, name=name, limits=limits, token=read_token(token_file), show=say, **where)  # type: ignore[arg-type]


def playground(
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """The playground in the browser: attack one image, and watch a purifier restore it, or fail to."""
    from unperturb.app import run_app

    use_threads(threads)
    run_app(host=host, port=port, open_browser=open_browser, device=device, show=say)
