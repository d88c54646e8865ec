"""Certificates: what is proved is true, beside closed forms and attacks."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

import unperturb as up
from unperturb.data import ImageSet, Splits
from unperturb.runs import RunError


class Half(nn.Module):
    """Bright or dark: the sign of the sum of the pixels less a half, two logits, linear."""

    def forward(self, images: Tensor) -> Tensor:
        total = (images - 0.5).sum((1, 2, 3))
        return torch.stack([-total, total], 1)


def greys(*values: float, labels: list[int]) -> ImageSet:
    pixels = torch.tensor(values).mul(255).round().to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).clone()
    return up.as_image_set((pixels, torch.tensor(labels)))


def certify(model: object, data: object, **options: object) -> up.Certificates:
    return up.certify(model, data, **{"quiet": True, "draws": 1000, "sigma": 0.25, **options})  # type: ignore[arg-type]


def test_a_linear_model_is_certified_almost_up_to_its_boundary() -> None:
    # Sixteen pixels, each d away from 1/2: the boundary is 4 d away, and of a linear model that is what can be proved.
    found = certify(Half(), greys(0.6, 0.55, 0.4, labels=[1, 1, 0]), draws=20_000)
    distances = [4 * abs(v / 255 - 0.5) for v in (153, 140, 102)]
    assert found.rows["prediction"].tolist() == [1, 1, 0]
    for radius, distance in zip(found.rows["radius"], distances):
        assert 0.9 * distance < radius < distance
    assert found.accuracy(0.1)[0] == 1.0
    assert found.accuracy(0.3)[0] == pytest.approx(2 / 3)
    assert found.accuracy(0.5)[0] == 0.0


def test_what_is_wrong_or_undecided_has_no_radius() -> None:
    found = certify(Half(), greys(0.8, 0.5, labels=[0, 1]), draws=200)
    assert found.rows["prediction"][0] == 1  # wrong, and certified no further
    assert found.rows["radius"].tolist() == [0.0, 0.0]
    assert found.rows["prediction"][1] in (0, -1)  # near the boundary: a wrong guess, or none
    assert found.accuracy()[0] == 0.0


def test_the_bound_is_the_exact_one() -> None:
    found = certify(Half(), greys(0.55, labels=[1]), draws=500, alpha=0.01)
    votes, lower, radius = (found.rows[key][0] for key in ("votes", "lower", "radius"))
    assert binom.sf(votes - 1, 500, lower) == pytest.approx(0.01, rel=1e-6)
    assert radius == pytest.approx(0.25 * NormalDist().inv_cdf(lower))
    assert found.largest == pytest.approx(0.25 * NormalDist().inv_cdf(0.01 ** (1 / 500)))


def test_no_attack_inside_the_radius_changes_the_answer(tiny_digits: Splits) -> None:
    torch.manual_seed(3)
    net = up.create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35]).eval()
    data = tiny_digits.test
    images, _ = data.batch(torch.arange(40))
    data = up.as_image_set(((images * 255).round().to(torch.uint8), net(images).argmax(1)))  # its own answers
    found = certify(net, data, sigma=0.1, draws=2000)
    sure = torch.tensor(found.rows["radius"].to_numpy()) > 0.02
    assert int(sure.sum()) >= 10
    images, labels = data.batch(torch.arange(40))
    images, labels = images[sure], labels[sure]
    radius = torch.tensor(found.rows["radius"].to_numpy(), dtype=torch.float32)[sure]
    smooth = Smoothed(net, 0.1, 50)
    x_adv = up.create_attack("pgd", norm="l2", eps=1.0, steps=10)(smooth, images, labels)
    shift = x_adv - images
    shift *= (0.99 * radius / shift.flatten(1).norm(dim=1).clamp(min=1e-9))[:, None, None, None]
    votes = torch.stack([net(images + shift + 0.1 * torch.randn_like(images)).argmax(1) for _ in range(1000)])
    assert torch.equal(votes.mode(0).values, labels)


class Smoothed(nn.Module):
    """The mean probabilities over draws of the noise, for an attacker to climb."""

    def __init__(self, net: nn.Module, sigma: float, draws: int) -> None:
        super().__init__()
        self.net, self.sigma, self.draws = net, sigma, draws

    def forward(self, images: Tensor) -> Tensor:
        shown = (images + self.sigma * torch.randn_like(images) for _ in range(self.draws))
        return torch.stack([self.net(x).softmax(1) for x in shown]).mean(0).log()


def test_a_stopped_run_goes_on_to_the_same_certificates(tmp_path: Path) -> None:
    data = greys(*[0.3 + 0.05 * i for i in range(9)], labels=[0] * 4 + [1] * 5)
    whole = certify(Half(), data, batch=3, draws=300)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise StoppedError

    half = Half()  # a class of one's own is known by itself, in one process
    with pytest.raises(StoppedError):
        certify(half, data, batch=3, draws=300, out=tmp_path, progress=stop)
    assert len(list((tmp_path / "certificates").iterdir())) == 2
    with pytest.raises(RunError, match="already holds this run"):
        certify(half, data, batch=3, draws=300, out=tmp_path)
    with pytest.raises(RunError, match="already holds another run: draws"):
        certify(half, data, batch=3, draws=301, out=tmp_path, resume=True)
    again = certify(half, data, batch=3, draws=300, out=tmp_path, resume=True)
    assert again.rows.equals(whole.rows)


def test_a_resumed_run_knows_another_model_of_ones_own(tmp_path: Path) -> None:
    class Reversed(Half):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).flip(1)

    data = greys(0.3, 0.4, 0.6, 0.7, labels=[0, 0, 1, 1])
    certify(Half(), data, batch=2, draws=50, out=tmp_path)
    again = certify(Half(), data, batch=2, draws=50, out=tmp_path, resume=True)  # as in another process
    assert len(again.rows) == 4
    with pytest.raises(RunError, match="was begun with another model"):
        certify(Reversed(), data, batch=2, draws=50, out=tmp_path, resume=True)


def test_an_answer_that_is_no_number_is_no_vote() -> None:
    class Sometimes(Half):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return torch.where(images[:, 0, 0, 0, None] > images[:, 0, 1, 1, None], logits, torch.nan)

    found = certify(Sometimes(), greys(0.9, labels=[1]), sigma=0.1, draws=2000)
    assert found.rows["votes"][0] == pytest.approx(1000, abs=150)
    silent = certify(Sometimes(), greys(0.9, 0.1, labels=[0, 0]), sigma=0.1, draws=200)
    assert silent.rows["radius"][0] == 0.0


def test_denoised_smoothing_brings_its_noise(tiny_digits: Splits) -> None:
    net = up.create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    defense = up.create_defense("denoised_smoothing", channels=1, sigma=0.1, denoiser={"width": 4})
    ours = up.Protected(net, defense)
    found = certify(ours, tiny_digits.test, n=4, sigma=None, draws=20)
    assert found.settings["sigma"] == 0.1
    assert len(found.rows) == 4
    with pytest.raises(ValueError, match=r"'model' adds noise of sigma 0.1 itself: leave sigma out, not 0.25"):
        certify(ours, tiny_digits.test, n=4, sigma=0.25)


def test_mistakes(tiny_digits: Splits) -> None:
    net = up.create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    with pytest.raises(ValueError, match=r"sigma, the standard deviation of the noise, must be above 0"):
        certify(net, tiny_digits.test, sigma=None)
    with pytest.raises(ValueError, match=r"alpha must lie between 0 and 0.5"):
        certify(net, tiny_digits.test, alpha=0.5)
    with pytest.raises(ValueError, match=r"draws must be a whole number of 1 or more, not 0"):
        certify(net, tiny_digits.test, draws=0)

    class Other(up.Defense):
        random = True

        def purify(self, images: Tensor) -> Tensor:
            return images + torch.rand_like(images) / 100

    with pytest.raises(ValueError, match=r"is random in a way of its own"):
        certify(up.Protected(net, Other()), tiny_digits.test)


def test_table_curve_and_rows_are_written(tmp_path: Path) -> None:
    found = certify(Half(), greys(0.7, 0.6, 0.2, labels=[1, 1, 1]), draws=200)
    written = found.write(tmp_path)
    text = written["md"].read_text()
    assert "Randomized smoothing with sigma 0.25: 3 images" in text
    assert "| 0 | 66.7 % [20.8, 93.9] |" in text
    assert written["csv"].read_text().startswith("index,label,prediction,votes,lower,radius\n")
    assert written["png"].stat().st_size > 5000
    assert str(found).startswith("model\n")
