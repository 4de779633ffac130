"""Figures of merit against known cases."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_fast.fidelity import CLIP, clip_score, compare, median_psnr_db
from diffusion_fast.pipeline import byte_tokenizer


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


def test_clip_is_asked_where_its_weights_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP of random weights lies where the hub's cache would keep the real one; the network is out of reach."""
    from huggingface_hub import constants
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    image = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert clip_score(image, "a castle") is None

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 520, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    model, size = CLIPModel(config), {"height": 32, "width": 32}
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    repository = tmp_path / f"models--{CLIP.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123"
    model.save_pretrained(snapshot)
    CLIPProcessor(pixels, byte_tokenizer(512)).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    score = clip_score(image, "a castle")
    assert score is not None
    bytes_ = [(each * 255).round().byte() for each in image]
    inputs = CLIPProcessor.from_pretrained(snapshot)(text=["a castle"], images=bytes_, return_tensors="pt")
    with torch.no_grad():
        shown, said = model(**inputs).image_embeds, model(**inputs).text_embeds
    assert score == pytest.approx(max(100 * float((shown @ said.T).mean()), 0), abs=1e-3)


def test_of_many_pictures_the_median_counts() -> None:
    references = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    pictures = references.copy()
    assert median_psnr_db(pictures, references) is None  # equal to the last bit
    pictures[:3] ^= 1  # each value off by one: a mean square error of 1
    pictures[0] = 255 - references[0]  # another picture altogether: one of five says little
    assert median_psnr_db(pictures, references) == pytest.approx(10 * math.log10(255**2))
    with pytest.raises(ValueError, match="their references"):
        median_psnr_db(pictures[:4], references)
