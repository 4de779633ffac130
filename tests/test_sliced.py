"""Attention of a head too wide for fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0

from diffusion_fast import plan, sliced
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import layers
from diffusion_fast.sliced import SlicedAttention
from diffusion_fast.spec import Recipe
from tests.conftest import H100, planned
from tests.test_models import small
from tests.test_optimizations import build


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def vae_attention(width: int = 288) -> Attention:
    """As AutoencoderKL has it."""
    torch.manual_seed(0)
    return Attention(width, heads=1, dim_head=width, norm_num_groups=32, bias=True, residual_connection=True).eval()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_in_slices_it_is_what_it_was(rows: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "SCORES", rows * 2 * 6 * 7)
    whole, image = torch.nn.ModuleList([vae_attention()]), torch.randn(2, 288, 6, 7)
    (layer,) = whole
    if fused:
        layer.fuse_projections()
    layer.set_processor(FusedAttnProcessor2_0() if fused else AttnProcessor2_0())
    before = layer(image)
    assert sliced.slice_wide_heads(whole) == 1
    torch.testing.assert_close(layer(image), before, rtol=1e-4, atol=1e-5)


def test_large_scores_keep_their_digits() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 500, 512).to(torch.bfloat16) for _ in range(3))
    query *= 20  # scores of 20 and more, which bf16 would round by 0.06
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    rounded = (query @ key.transpose(1, 2) * 512**-0.5).softmax(-1) @ value
    ours, theirs, worse = (
        (made.double() - exact).norm() / exact.norm() for made in (sliced.attend(query, key, value), fused, rounded)
    )
    assert ours < 1.5 * theirs
    assert worse > 3 * ours


def test_there_are_never_more_slices_than_a_graph_should_have(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: products.append(args[0].shape) or bmm(*args))
    monkeypatch.setattr(sliced, "SCORES", 1)
    sliced.attend(*(torch.randn(1, 1000, 8) for _ in range(3)))
    assert len(products) == 2 * sliced.MOST_SLICES


def test_narrow_heads_stay_with_the_fused_kernels() -> None:
    whole = torch.nn.ModuleList([vae_attention(256)])
    assert sliced.slice_wide_heads(whole) == 0
    assert not isinstance(whole[0].processor, SlicedAttention)
    made, _ = build("sdpa")
    with pytest.raises(RuntimeError, match="no attention of the VAE has one head wider than 256"):
        layers.sliced_vae_attention(made)


@pytest.mark.parametrize("name", ["sdxl", "sd15", "flux-schnell", "sd3.5-medium", "pixart-alpha"])
def test_the_models_that_are_said_to_have_wide_heads_have_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliced, "WIDEST", 8)  # of a miniature
    made, _ = small(name, tmp_path, monkeypatch, "sdpa")
    assert layers.sliced_vae_attention(made) == {"attention_layers": 1}


def test_it_is_left_out_where_there_is_none() -> None:
    for name in ("tiny", "sana"):
        with pytest.raises(ValueError, match=f"can't be applied to {name}: it has no VAE with a head too wide"):
            names = ("tf32", "bf16", "sdpa", "sliced_vae_attention")
            plan.plan_recipe(MODELS[name], Recipe("mine", names), H100)
    assert "sliced_vae_attention is left out" in " ".join(planned("fast", H100).notes)
