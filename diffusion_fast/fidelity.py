"""How far an image is from its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fidelity:
    """PSNR in dB and SSIM (1 is equal). Equal images have an infinite PSNR, which is None and `identical` here."""

    psnr_db: float | None
    ssim: float
    identical: bool


def compare(image: Any, reference: Any) -> Fidelity:
    """Compare two batches of images: float tensors of shape (batch, 3, height, width) in 0..1, before rounding.

    SSIM as Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861), as torchmetrics has it. Raises ValueError where
    the shapes differ or a value isn't finite.
    """
    import torch
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    if image.shape != reference.shape:
        raise ValueError(f"the image is {tuple(image.shape)} and its reference {tuple(reference.shape)}")
    if not (torch.isfinite(image).all() and torch.isfinite(reference).all()):
        raise ValueError("the image has values that are not finite")
    identical = bool(torch.equal(image, reference))
    psnr = float(peak_signal_noise_ratio(image, reference, data_range=1.0))
    ssim = structural_similarity_index_measure(image, reference, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)
    return Fidelity(psnr if math.isfinite(psnr) else None, float(ssim), identical)
