"""What no attacker can change: a radius around each image in which the answer is proved to stay, by smoothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor

    from unperturb.data import ImageSet
    from unperturb.systems import System

ABSTAINS = -1


@dataclass(frozen=True, eq=False)
class Certificates:
    """What `certify` found.

    rows: a line an image: index, label, prediction (-1 where it abstains), votes of `draws` for it, lower (bound of
    their probability), radius (L2, in pixel units; 0 where it abstains or where the guess is wrong). settings: what
    fixes the run.
    """

    system: str
    rows: pd.DataFrame
    settings: dict[str, Any]

    def accuracy(self, radius: float = 0.0) -> tuple[float, float, float]:
        """Certified accuracy at an L2 `radius` with Wilson's 95 % interval: the share of images that are answered
        rightly, proved up to there. All in [0, 1]."""
        from unperturb.intervals import wilson

        right = self.rows["prediction"] == self.rows["label"]
        count = int((right & (self.rows["radius"] >= radius)).sum())
        return (count / len(self.rows), *wilson(count, len(self.rows)))

    @property
    def largest(self) -> float:
        """The radius that an image is certified at when all draws agree: none can be larger."""
        draws = self.settings["draws"]
        return _radius(_lower(draws, draws, self.settings["alpha"]), self.settings["sigma"])

    def radii(self, most: int = 8) -> list[float]:
        """Round radii from 0 to the largest, at most so many."""
        step = next((s for s in (0.05, 0.1, 0.125, 0.25, 0.5, 1.0, 2.0) if self.largest / s <= most - 1), 5.0)
        return [i * step for i in range(int(self.largest / step) + 1)]

    def table(self, radii: Sequence[float] | None = None) -> str:
        """Certified accuracy by radius, as Markdown."""
        from unperturb.results.render import percent

        at = self.radii() if radii is None else radii
        lines = [f"| {r:g} | {percent(*self.accuracy(r))} |" for r in at]
        return "\n".join(["| L2 radius | certified accuracy |", "|---|---|", *lines])

    def figure(self) -> Any:
        """Certified accuracy against the radius."""
        import numpy as np
        from matplotlib.figure import Figure

        from unperturb.results.figures import percent_axis

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        at = np.linspace(0, max(self.largest, 1e-3) * 1.02, 400)
        found = np.array([self.accuracy(float(r)) for r in at]) * 100
        axes.fill_between(at, found[:, 1], found[:, 2], color="#2a6f97", alpha=0.18, linewidth=0)
        axes.plot(at, found[:, 0], color="#2a6f97", linewidth=2)
        axes.set_xlim(0, float(at[-1]))
        axes.set_xlabel("L2 radius, pixels in [0, 1]")
        axes.set_ylabel("certified accuracy, %")
        percent_axis(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(
            f"{self.system}: sigma {self.settings['sigma']:g}, {len(self.rows):,} images of {self.settings['data']}",
            loc="left",
            fontsize=11,
        )
        return figure

    def write(self, out: str | Path) -> dict[str, Path]:
        """Table, curve and rows in the folder `out`: `certificates.md`, `.png` and `.csv`; the paths by their kind."""
        from unperturb import runs
        from unperturb.results.figures import save

        out = Path(out)
        said = f"# {self.system}: certificates\n\n{self.conditions}\n\n{self.table()}\n"
        runs.write_text(out / "certificates.md", said)
        runs.write_text(out / "certificates.csv", self.rows.to_csv(index=False))
        save(self.figure(), out / "certificates.png")
        return {kind: out / f"certificates.{kind}" for kind in ("md", "csv", "png")}

    @property
    def conditions(self) -> str:
        """What the numbers hold for, in a sentence."""
        s = self.settings
        return (
            f"Randomized smoothing with sigma {s['sigma']:g}: {len(self.rows):,} images of {s['data']} ({s['split']}), "
            f"{s['draws']:,} draws each, each certificate true with a probability of {100 * (1 - s['alpha']):g} %."
        )

    def __str__(self) -> str:
        return f"{self.system}\n{self.conditions}\n\n{self.table()}"


def certify(
    model: Callable[[Tensor], Any] | System,
    data: Any,
    *,
    sigma: float | None = None,
    n: int | None = None,
    draws: int = 10_000,
    selection: int = 100,
    alpha: float = 0.001,
    batch: int = 100,
    seed: int = 0,
    name: str = "model",
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    quiet: bool = False,
) -> Certificates:
    """Certify the smoothed `model`: the class that it answers most often when Gaussian noise is added to the image.

    No change of the image that is shorter than its radius, in L2, changes that class; each statement is true with a
    probability of 1 - `alpha` over the draws. It is the answer by majority that is certified, not that of one draw.

    model: as `benchmark` takes it. A `DenoisedSmoothing` brings its noise; before anything else noise of `sigma` (in
    pixel units) is added, cut to [0, 1] in front of a purifier. data: test images with labels. n: a fixed random subset
    of so many (500, or all of fewer). draws: to certify an image; selection: before, to guess its class; an image whose
    guess is wrong is certified no further. batch: images asked at once; a file of rows each. out: run folder, in which
    a stopped run goes on with `resume` (default: nothing is kept).

    Raises `ValueError` for a model that is random in another way, or for numbers that make no certificate, and
    `RunError` where `out` holds another run.

    Source: Cohen, Rosenfeld and Kolter 2019, "Certified adversarial robustness via randomized smoothing", CERTIFY.
    """
    from unperturb.certifying.shards import in_shards, plan_for
    from unperturb.evaluation.checks import check_number

    plan = plan_for(model, data, n, name, device)
    (system,), images = plan.systems, plan.data
    noise = noise_of(system, sigma)
    for what, number in (("draws", draws), ("selection", selection)):
        check_number(what, number, 1)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie between 0 and 0.5, such as 0.001, not {alpha}")
    settings = {
        "kind": "certificates", "data": images.source, "split": images.name, "n": len(images), "sigma": noise,
        "draws": draws, "selection": selection, "alpha": alpha, "batch": batch, "seed": seed,
    }  # fmt: skip
    answer = smoothed(system, noise)
    rows = in_shards(
        plan, lambda at: _certified(answer, images, at, plan.device, draws, selection, alpha, noise), settings,
        batch=batch, seed=seed, out=out, resume=resume, progress=progress, quiet=quiet,
    )  # fmt: skip
    return Certificates(system.name, rows, settings)


def noise_of(system: System, sigma: float | None) -> float:
    """The standard deviation of the noise that `system` is smoothed with; raises `ValueError` where there is none, or
    noise of another kind."""
    from unperturb.defenses.denoised_smoothing import DenoisedSmoothing

    if isinstance(system.purifier, DenoisedSmoothing):
        if sigma not in (None, system.purifier.sigma):
            raise ValueError(
                f"{system.name!r} adds noise of sigma {system.purifier.sigma:g} itself: leave sigma out, not {sigma:g}"
            )
        return system.purifier.sigma
    if system.random:
        raise ValueError(
            f"{system.name!r} is random in a way of its own; a certificate is known for Gaussian noise on the image: "
            "take denoised_smoothing, or a model that is not random, and sigma"
        )
    if sigma is None or not sigma > 0:
        raise ValueError("sigma, the standard deviation of the noise, must be above 0, such as 0.25")
    return sigma


def smoothed(system: System, sigma: float) -> Callable[[Tensor], Tensor]:
    """From images to logits by one draw of the noise, from torch's generator."""
    import torch

    from unperturb.modules import logits_of

    model = system.model
    if system.random:  # it brings its noise
        return lambda images: logits_of(model, images)
    if system.purifier is None:
        return lambda images: logits_of(model, images + sigma * torch.randn_like(images))
    return lambda images: logits_of(model, (images + sigma * torch.randn_like(images)).clamp(0, 1))


def _certified(
    answer: Callable[[Tensor], Tensor],
    data: ImageSet,
    rows: Tensor,
    device: torch.device,
    draws: int,
    selection: int,
    alpha: float,
    sigma: float,
) -> pd.DataFrame:
    """The certificates of one shard."""
    import pandas as pd
    import torch

    images, labels = data.batch(rows, device)
    images = images.contiguous(memory_format=torch.channels_last)
    guess = _votes(answer, images, selection).argmax(1)
    sure = guess == labels
    votes = torch.zeros_like(labels)
    if bool(sure.any()):
        votes[sure] = _votes(answer, images[sure], draws).gather(1, guess[sure][:, None])[:, 0]
    lower = [_lower(v, draws, alpha) for v in votes.tolist()]
    radius = [_radius(bound, sigma) for bound in lower]
    prediction = torch.where(sure & (torch.tensor(radius, device=device) <= 0), ABSTAINS, guess)
    return pd.DataFrame(
        {
            "index": data.index[rows].tolist(),
            "label": labels.tolist(),
            "prediction": prediction.tolist(),
            "votes": votes.tolist(),
            "lower": lower,
            "radius": radius,
        }
    )


def _votes(answer: Callable[[Tensor], Tensor], images: Tensor, draws: int) -> Tensor:
    """`(N, K)`: how often each class is the answer, of `draws` for each image; logits that are not finite are none."""
    import torch

    from unperturb.modules import classes_of

    with torch.inference_mode():
        counts: Any = 0
        for _ in range(draws):
            logits = answer(images)
            counts = counts + torch.nn.functional.one_hot(classes_of(logits) + 1, logits.shape[1] + 1)[:, 1:]
    found: Tensor = counts
    return found


def _lower(votes: int, draws: int, alpha: float) -> float:
    """The one-sided bound, exact, below the probability of a class that was answered `votes` times."""
    from unperturb.intervals import clopper_pearson

    return clopper_pearson(votes, draws, 1 - 2 * alpha)[0]


def _radius(lower: float, sigma: float) -> float:
    from statistics import NormalDist

    return sigma * NormalDist().inv_cdf(lower) if lower > 0.5 else 0.0
