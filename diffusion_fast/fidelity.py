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


CLIP = "openai/clip-vit-large-patch14"  # one model, so that scores compare


def clip_score(image: Any, prompt: str) -> float | None:
    """How well the images show the prompt, 0 to 100: the mean cosine similarity of CLIP's embeddings, times 100.

    Hessel et al. 2021 (https://arxiv.org/abs/2104.08718), scaled as torchmetrics scales it. `image`: float tensor of
    shape (batch, 3, height, width) in 0..1. None where CLIP's weights aren't in the hub's cache: nothing is downloaded.
    """
    import torch
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(CLIP, "model.safetensors"), str):
        return None
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(CLIP, local_files_only=True, use_safetensors=True)
    processor = CLIPProcessor.from_pretrained(CLIP, local_files_only=True)
    pixels = list((image * 255).round().clamp(0, 255).byte())
    # CLIP reads 77 tokens: what comes after them it never sees.
    inputs = processor(text=[prompt], images=pixels, return_tensors="pt", truncation=True, max_length=77)
    with torch.no_grad():
        found = model(**inputs)
    similarity = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
    return float(similarity.mean().clamp(min=0) * 100)


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
    # Of equal images with flat areas rounding makes 0.9999.
    return Fidelity(psnr if math.isfinite(psnr) else None, 1.0 if identical else float(ssim), identical)


def median_psnr_db(pictures: Any, references: Any) -> float | None:
    """Of many pictures, each against its own reference: bytes of shape (pictures, height, width, 3).

    The median, because a few that show something else would decide the mean. None where half of them are equal to
    their references. Raises ValueError where the shapes differ.
    """
    import numpy as np
    from skimage.metrics import peak_signal_noise_ratio

    if pictures.shape != references.shape:
        raise ValueError(f"the pictures are {pictures.shape} and their references {references.shape}")
    with np.errstate(divide="ignore"):
        found = [peak_signal_noise_ratio(one, other) for one, other in zip(references, pictures, strict=True)]
    median = float(np.median(found))
    return median if np.isfinite(median) else None
