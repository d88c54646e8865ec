"""Feature squeezing: the score by hand, thresholds that hold, and a learned purifier as squeezer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unperturb as up
from unperturb import metrics
from unperturb.defenses import Defense, Protected, create_defense, load_defense, save_defense
from unperturb.defenses.feature_squeezing import FeatureSqueezing


class Dim(Defense):
    """A purifier that makes every pixel darker."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def purify(self, images: Tensor) -> Tensor:
        return images * self.by


class Mean(nn.Module):
    """Two classes by the mean of the pixels: logits (log m, log (1 - m)), so that probabilities are m and 1 - m."""

    def forward(self, images: Tensor) -> Tensor:
        m = images.mean((1, 2, 3)).clamp(0.001, 0.999)
        return torch.stack([m.log(), (1 - m).log()], 1)


IMAGES = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1, 1).expand(3, 1, 4, 4).contiguous()


def test_how_far_an_answer_moves() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.2, 0.7]])
    assert float(metrics.moved(p, q)) == pytest.approx(0.6)
    assert float(metrics.moved(p, p)) == 0
    assert float(metrics.moved(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))) == pytest.approx(1)


def test_the_score_is_that_of_the_squeezer_that_moves_it_furthest() -> None:
    model = Mean()
    for purifies in (True, False):
        squeezing = FeatureSqueezing(squeezers=[Dim(0.5), Dim(0.9), Dim(0.75)], purifies=purifies)
        purified, scores = squeezing.purify_and_score(IMAGES, model)
        torch.testing.assert_close(scores, torch.tensor([[0.1], [0.25], [0.4]]))
        torch.testing.assert_close(purified, IMAGES * (0.5 if purifies else 1))
        torch.testing.assert_close(squeezing(IMAGES), purified)
        torch.testing.assert_close(squeezing.scores(IMAGES, model), scores)


def test_thresholds_turn_away_no_more_clean_images_than_they_may() -> None:
    squeezing = FeatureSqueezing(squeezers=[Dim(0.5)], drop_rate=0.1)
    clean = torch.linspace(0.05, 0.95, 40).view(40, 1, 1, 1).expand(40, 1, 4, 4).contiguous()
    protected = Protected(Mean(), squeezing)
    assert not protected.rejects(clean).any()  # nothing before it is calibrated
    squeezing.calibrate(squeezing.scores(clean, Mean()))
    assert protected.rejects(clean).tolist() == [False] * 36 + [True] * 4


def test_reject_above(tmp_path: Path) -> None:
    protected = Protected(Mean(), Dim(0.5), reject_above=0.2)
    torch.testing.assert_close(protected.suspicion(IMAGES), torch.tensor([0.1, 0.25, 0.4]))
    assert protected.rejects(IMAGES).tolist() == [False, True, True]
    torch.testing.assert_close(protected(IMAGES), Protected(Mean(), Dim(0.5))(IMAGES))
    torch.testing.assert_close(Protected(Mean(), Dim(0.5)).suspicion(IMAGES), protected.suspicion(IMAGES))
    with pytest.raises(ValueError, match=r"reject_above is a suspicion in \[0, 1\], not 2"):
        Protected(Mean(), Dim(0.5), reject_above=2)
    with pytest.raises(ValueError, match="MagNet has detectors of its own"):
        Protected(Mean(), create_defense("magnet", channels=1), reject_above=0.5)
    # Saved and read again it turns away the same.
    classifier = up.create_classifier("convnet", channels=1, size=4, classes=3, mean=[0.5], std=[0.5]).eval()
    kept = Protected(classifier, create_defense("bit_depth", bits=1), reject_above=0.01)
    again = Protected.from_pretrained(kept.save_pretrained(tmp_path / "kept"))
    images = torch.rand(20, 1, 4, 4)
    assert torch.equal(kept.rejects(images), again.rejects(images))
    assert again.defense.thresholds.tolist() == pytest.approx([0.01])


def test_a_squeezer_named_by_its_folder_is_copied(tmp_path: Path) -> None:
    learned = create_defense("paired_gan", channels=1, generator={"name": "unet", "width": 4})
    nn.init.normal_(learned.generator.head.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    save_defense(tmp_path / "learned", learned, {})
    squeezing = create_defense("feature_squeezing", channels=1, squeezers=[str(tmp_path / "learned"), "median"])
    save_defense(tmp_path / "squeezing", squeezing, {})
    for file in (tmp_path / "learned").iterdir():
        file.unlink()
    again = load_defense(tmp_path / "squeezing")
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(again(images), learned(images).clamp(0, 1))
    with pytest.raises(ValueError, match="needs at least one squeezer"):
        create_defense("feature_squeezing", channels=1, squeezers=[])
