"""PSNR, SSIM and distances against scikit-image and counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from unperturb.metrics import distances, psnr, ssim


def _pair(shape: tuple[int, ...], noise: float) -> tuple[Tensor, Tensor]:
    reference = torch.rand(shape)
    reference[:, :, : shape[2] // 2] = reference[:, :, : shape[2] // 2].round()  # flat black and white, as in digits
    return (reference + noise * torch.randn(shape)).clamp(0, 1), reference


def _skimage_ssim(x: Tensor, reference: Tensor) -> float:
    return structural_similarity(
        x.numpy().astype(np.float64),
        reference.numpy().astype(np.float64),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
    )


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 3, 32, 20)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_psnr_and_ssim_equal_scikit_image(shape: tuple[int, ...], noise: float) -> None:
    x, reference = _pair(shape, noise)
    found, similar = psnr(x, reference), ssim(x, reference)
    assert found.shape == similar.shape == (3,)
    for i in range(3):
        expected = peak_signal_noise_ratio(reference[i].numpy(), x[i].numpy(), data_range=1)
        assert float(found[i]) == pytest.approx(expected, abs=1e-4)
        assert float(similar[i]) == pytest.approx(_skimage_ssim(x[i], reference[i]), abs=1e-5)


def test_ssim_of_black_images_and_of_identical_ones() -> None:
    black = torch.zeros(1, 1, 28, 28)
    assert float(ssim(black, black)) == pytest.approx(1, abs=1e-6)
    x = black.clone()
    x[0, 0, 10:18, 10:18] = 1  # mostly empty, as a digit is: variances near 0 must not be lost to rounding
    assert float(ssim(x, black)) == pytest.approx(_skimage_ssim(x[0], black[0]), abs=1e-5)


def test_ssim_of_bright_flat_images_keeps_its_digits() -> None:
    reference = torch.full((1, 3, 32, 32), 0.9)
    x = (reference + 0.02 * torch.randn_like(reference)).clamp(0, 1)
    assert float(ssim(x, reference)) == pytest.approx(_skimage_ssim(x[0], reference[0]), abs=1e-6)


def test_psnr_of_a_known_error_and_of_identical_images() -> None:
    x = torch.stack([torch.full((1, 8, 8), 0.1), torch.zeros(1, 8, 8)])
    found = psnr(x, torch.zeros_like(x))
    assert float(found[0]) == pytest.approx(20, abs=1e-4)  # an error of a tenth of the peak everywhere
    assert float(found[1]) == float("inf")


def test_ssim_is_nan_below_the_window_and_a_number_at_it() -> None:
    assert torch.isnan(ssim(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8))).tolist() == [True, True]
    assert torch.isnan(ssim(torch.rand(2, 1, 10, 28), torch.rand(2, 1, 10, 28))).tolist() == [True, True]
    x, reference = _pair((1, 1, 11, 11), 0.1)
    assert float(ssim(x, reference)) == pytest.approx(_skimage_ssim(x[0], reference[0]), abs=1e-5)


def test_an_image_is_judged_alone() -> None:
    x, reference = _pair((4, 3, 16, 16), 0.2)
    for metric in (psnr, ssim):
        together, alone = metric(x, reference), metric(x[2:3], reference[2:3])
        assert float(together[2]) == pytest.approx(float(alone), abs=1e-5)


def test_distances_by_hand() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    x = reference.clone()
    x[0, 0, 0, 0], x[0, 2, 0, 0] = 0.3, 0.4  # one place, two of its channels
    x[0, 1, 3, 3] = 5e-7  # float noise, not a change
    x[1, :, 1] = 0.5
    found = distances(x, reference)
    assert found["l0"].tolist() == [1, 4]
    assert found["l2"].tolist() == pytest.approx([0.5, 0.5 * 12**0.5])
    assert found["linf"].tolist() == pytest.approx([0.4, 0.5])


def test_an_empty_batch_has_empty_answers() -> None:
    nothing = torch.zeros(0, 1, 28, 28)
    assert psnr(nothing, nothing).shape == ssim(nothing, nothing).shape == (0,)
    assert all(v.shape == (0,) for v in distances(nothing, nothing).values())


@pytest.mark.parametrize("metric", [psnr, ssim, distances])
def test_shapes_that_would_broadcast_are_refused(metric) -> None:
    with pytest.raises(ValueError, match="same shape"):
        metric(torch.rand(4, 1, 12, 12), torch.rand(1, 1, 12, 12))
