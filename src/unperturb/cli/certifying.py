"""The verb that proves: certify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unperturb.cli.options import Device, Mean, Out, Resume, Std, Threads, Weights, numbers, use_threads
from unperturb.cli.terminal import progress_bar, say


def certify(
    model: Annotated[str, typer.Argument(help="A run folder, zoo:NAME, net.onnx, or module:object.")],
    data: Annotated[str, typer.Option(help="A data set: digits, mnist, folder:PATH, ... (see: list datasets)")],
    defense: Annotated[str | None, typer.Option(help="A purifier before it: a run folder, zoo:NAME or a name.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Of the noise; denoised_smoothing brings its own.")] = None,
    patch: Annotated[int | None, typer.Option(min=1, help="Prove a square patch of so many pixels a side.")] = None,
    masks: Annotated[int, typer.Option(min=1, help="With --patch: masks along each axis.")] = 6,
    fill: Annotated[float, typer.Option(help="With --patch: what a mask shows, in [0, 1].")] = 0.5,
    n: Annotated[int | None, typer.Option("--n", min=1, help="A fixed random subset (default: 500).")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Noisy copies of each image.")] = 10_000,
    alpha: Annotated[float, typer.Option(help="How likely a certificate may be wrong.")] = 0.001,
    batch: Annotated[int, typer.Option(min=1, help="Images asked at once.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side that pictures are resized to.")] = None,
    out: Out = None,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
) -> None:
    """Prove where no attacker changes the answer: an L2 radius around each image, by smoothing; with --patch a patch
    that may lie anywhere and show anything, by double masking."""
    from unperturb import zoo
    from unperturb.benchmarking import model_from
    from unperturb.certifying import Certificates, PatchCertificates, certify_patch
    from unperturb.certifying import certify as run_certify
    from unperturb.data import load_dataset

    use_threads(threads)
    images = getattr(load_dataset(data, size=size), split)
    own = {"weights": weights, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std")}
    judged = model_from(model, images, defense=defense, **own)  # type: ignore[arg-type]
    name = Path((defense or model).removeprefix(zoo.PREFIX)).name.replace(":", "-")
    out = out or Path("runs") / (f"certify-{name}" if patch is None else f"certify-{name}-patch{patch}")
    if patch is not None and sigma is not None:
        raise typer.BadParameter("a patch is proved by masks, not by noise: leave --sigma out", param_hint="--patch")
    proved: Certificates | PatchCertificates
    with progress_bar("certifying") as update:
        if patch is not None:
            proved = certify_patch(
                judged, images, patch=patch, masks=masks, fill=fill, n=n, batch=batch, name=name, out=out,
                resume=resume, device=device, progress=update,
            )  # fmt: skip
        else:
            proved = run_certify(
                judged, images, sigma=sigma, n=n, draws=draws, alpha=alpha, batch=batch, seed=seed, name=name, out=out,
                resume=resume, device=device, progress=update,
            )  # fmt: skip
    say(proved)
    written = proved.write(out / "card")
    say(f"\n{', '.join(path.name for path in written.values())} in {out / 'card'}")
