"""Patch certificates: every patch is covered, the algorithm is the paper's, and no patch moves what is certified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unperturb as up
from unperturb.certifying.patches import DoubleMasking, covering_masks
from unperturb.data import ImageSet, Splits
from unperturb.runs import RunError


class Corners(nn.Module):
    """The brightest of the four quarters, by the sum of its pixels: logits from 4 products, no kernel that rounds."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2] // 2, images.shape[3] // 2
        parts = [images[..., :height, :width], images[..., :height, width:], images[..., height:, :width]]
        return torch.stack([p.sum((1, 2, 3)) for p in [*parts, images[..., height:, width:]]], 1)


class Table(nn.Module):
    """A fixed answer to each mask or pair of masks, so that the algorithm can be walked by hand."""

    def __init__(self, covered: Tensor, answers: dict[frozenset[int], int], default: int) -> None:
        super().__init__()
        self.covered, self.answers, self.default = covered, answers, default

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 4)
        for row, image in enumerate(images[:, 0] == 0.5):
            hidden = frozenset(i for i, mask in enumerate(self.covered) if bool((image | ~mask).all()))
            logits[row, self.answers.get(hidden, self.default)] = 1
        return logits


def bright(quarter: int, by: float = 0.9) -> Tensor:
    image = torch.full((1, 1, 8, 8), 0.1)
    row, column = divmod(quarter, 2)
    image[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = by
    return image


@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 32), (9, 14), (5, 5)])
@pytest.mark.parametrize("patch", [1, 3, 5])
@pytest.mark.parametrize("per_axis", [1, 2, 3, 6])
def test_wherever_a_patch_lies_one_mask_covers_it(height: int, width: int, patch: int, per_axis: int) -> None:
    covered = covering_masks(height, width, patch, per_axis)
    assert len(covered) <= per_axis**2
    for top in range(height - patch + 1):
        for left in range(width - patch + 1):
            assert covered[:, top : top + patch, left : left + patch].flatten(1).all(1).any()


def test_the_masks_are_those_of_the_paper() -> None:
    # Images of 28, a patch of 6, 6 masks an axis: stride ceil(23 / 6) = 4, side 6 + 4 - 1 = 9, the last at 28 - 9 = 19.
    covered = covering_masks(28, 28, 6, 6)
    assert covered.shape == (36, 28, 28)
    assert {int(m.sum()) for m in covered} == {81}
    assert [int(m.any(0).nonzero()[0]) for m in covered[:6]] == [0, 4, 8, 12, 16, 19]


def test_numbers_that_make_no_masks() -> None:
    with pytest.raises(ValueError, match="a patch of 9 x 9 pixels does not fit into images of 8 x 8"):
        DoubleMasking(Corners(), 9)(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        DoubleMasking(Corners(), 2, masks=0)(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"fill lies in \[0, 1\], not 2"):
        DoubleMasking(Corners(), 2, fill=2)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, 0),  # all agree
        ({frozenset({1}): 2}, 0),  # one differs, but wavers under a second mask
        ({frozenset({1, i}): 2 for i in range(4)} | {frozenset({1}): 2}, 2),  # it never wavers
        (
            {frozenset({m, i}): 1 + m for m in (1, 2) for i in range(4) if {m, i} != {1, 2}}
            | {frozenset({1}): 2, frozenset({2}): 3, frozenset({1, 2}): 3},
            3,  # the first of two wavers, the second does not
        ),
    ],
)
def test_the_algorithm_by_hand(answers: dict[frozenset[int], int], expected: int) -> None:
    covered = covering_masks(8, 8, 2, 2)
    model = Table(covered, answers, default=0)
    image = torch.zeros(1, 1, 8, 8)
    for batch in (1, 3, 1000):  # in whatever pieces it asks
        masked = DoubleMasking(model, 2, masks=2, batch=batch)
        assert int(masked(image).argmax(1)) == expected
        assert masked.certified(image, torch.tensor([0])).tolist() == [not answers]


def test_what_is_certified_is_answered_so_and_no_patch_changes_it() -> None:
    # Two masks hide at most 14 of the 16 pixels of a quarter, and make those of another at most 14 x 0.3 + 2 x 0.1.
    images = torch.cat([bright(0), bright(1), bright(2, 0.5), bright(3, 0.2)])
    labels = torch.tensor([0, 1, 2, 3])
    masked = DoubleMasking(Corners(), 2, masks=6, fill=0.3)
    proved = masked.certified(images, labels)
    assert proved.tolist() == [True, True, True, False]
    assert torch.equal(masked(images)[proved].argmax(1), labels[proved])
    for top in range(7):
        for left in range(7):
            for shown in (0.0, 1.0, torch.rand(1, 2, 2)):
                attacked = images.clone()
                attacked[..., top : top + 2, left : left + 2] = shown
                assert torch.equal(masked(attacked)[proved].argmax(1), labels[proved])
    # A wrong label is never certified, nor what is not finite.
    assert not masked.certified(images, (labels + 1) % 4).any()
    assert not DoubleMasking(lambda x: torch.full((len(x), 3), torch.nan), 2).certified(images, labels * 0).any()


def test_a_patch_that_an_attacker_makes_leaves_what_is_certified(tiny_digits: Splits) -> None:
    classifier = up.create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.4])
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
    images, labels = tiny_digits.train.batch(torch.arange(len(tiny_digits.train)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows = torch.randint(len(images), (128,), generator=generator)
        hidden = covering_masks(8, 8, 1, 3)[torch.randint(9, (128,), generator=generator)][:, None]
        shown = torch.where(hidden, torch.tensor(0.5), images[rows])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(shown), labels[rows]).backward()
        optimizer.step()
    images, labels = tiny_digits.test.batch(torch.arange(40))
    masked = DoubleMasking(classifier.eval(), 1, masks=3)
    proved = masked.certified(images, labels)
    assert int(proved.sum()) >= 5
    attack = up.create_attack("patch", area=1 / 64, steps=10)
    for seed in range(5):
        found = attack(classifier, images, labels, seed=seed)
        assert torch.equal(masked(found)[proved].argmax(1), labels[proved])


# The run -------------------------------------------------------------------------------------------------------------


def squares() -> ImageSet:
    pixels = torch.cat([bright(q, b) for b in (0.9, 0.2) for q in range(4)]).mul(255).round().to(torch.uint8)
    return up.as_image_set((pixels, torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])))


def test_rows_shares_and_what_is_written(tmp_path: Path) -> None:
    options = {"patch": 2, "masks": 6, "fill": 0.3, "batch": 3, "quiet": True}
    found = up.certify_patch(Corners(), squares(), **options, out=tmp_path / "run")  # type: ignore[arg-type]
    rows = found.rows
    assert sorted(rows["index"]) == list(range(8))
    whole = DoubleMasking(Corners(), 2, masks=6, fill=0.3)
    images, labels = squares().batch(torch.tensor(rows["index"].tolist()))
    assert rows["prediction"].tolist() == whole(images).argmax(1).tolist()
    assert rows["certified"].tolist() == whole.certified(images, labels).tolist()
    assert found.clean[0] == pytest.approx(float((rows["prediction"] == rows["label"]).mean()))
    assert found.accuracy[0] == pytest.approx(float(rows["certified"].mean()))
    assert found.accuracy[1] < found.accuracy[0] < found.accuracy[2]
    assert "| 2 x 2 pixels |" in found.table()
    paths = found.write(tmp_path / "card")
    assert "no square patch of 2 x 2 pixels" in paths["md"].read_text()
    assert len(paths["csv"].read_text().splitlines()) == 9
    # A shard that is lost is made again, the others are read.
    (tmp_path / "run" / "certificates" / "0001.parquet").unlink()
    again = up.certify_patch(Corners(), squares(), **options, out=tmp_path / "run", resume=True)  # type: ignore[arg-type]
    assert again.rows.equals(rows)
    with pytest.raises(RunError, match="another run"):
        up.certify_patch(Corners(), squares(), **(options | {"patch": 3}), out=tmp_path / "run", resume=True)  # type: ignore[arg-type]


def test_a_random_model_is_refused(tiny_digits: Splits) -> None:
    smoothed = up.create_defense("denoised_smoothing", channels=1, sigma=0.1, denoiser={"width": 4})
    classifier = up.create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.4])
    with pytest.raises(ValueError, match="is random"):
        up.certify_patch(up.Protected(classifier, smoothed), tiny_digits.test, patch=1, n=4, quiet=True)
