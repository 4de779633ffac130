"""Figures of merit against known cases."""

import math

import pytest
import torch

from diffusion_fast.fidelity import compare


def test_a_known_error_has_a_known_psnr() -> None:
    reference = torch.full((1, 3, 32, 32), 0.5)
    found = compare(reference + 0.1, reference)
    assert found.psnr_db == pytest.approx(-20 * math.log10(0.1), abs=1e-3)
    assert not found.identical


def test_the_same_image_is_identical_and_has_no_psnr() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = compare(image, image.clone())
    assert (found.psnr_db, found.identical) == (None, True)
    assert found.ssim == pytest.approx(1.0)


def test_noise_lowers_ssim() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 64, 64, generator=generator)
    noisy = (image + 0.3 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    assert compare(noisy, image).ssim < 0.9


def test_what_cannot_be_compared_is_refused() -> None:
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="its reference"):
        compare(image, torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="not finite"):
        compare(image * float("nan"), image)
