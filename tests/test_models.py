"""Each model: the parameters that were published, and as a miniature every optimization that applies to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffusion_fast import pipeline, plan
from diffusion_fast.models import MODELS, PACKAGE
from diffusion_fast.optimizations import OPTIMIZATIONS, Build
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.plan import plan_ladder, plan_recipe
from diffusion_fast.recipes import LADDERS
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100
from tests.miniatures import NAMES, miniature

PUBLISHED = {
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "ssd-1b": {"unet": 1_331_334_404, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "pixart-alpha": {"transformer": 611_349_152, "vae": 83_653_863, "text_encoder": 4_762_310_656},
    "pixart-sigma": {"transformer": 610_856_096, "vae": 83_653_863, "text_encoder": 4_762_310_656},
    "sd3.5-medium": {
        "transformer": 2_243_171_520,  # 2.5B with its table of positions, which is a buffer
        "vae": 83_819_683,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
    "flux-schnell": {
        "transformer": 11_891_178_560,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
    "flux-dev": {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
    "sana": {"transformer": 1_604_462_752, "vae": 312_250_275, "text_encoder": 2_614_341_888},
}
# What an optimization needs beside it, and what it can't do here: on a CPU, without weights from the hub.
BESIDE = {
    "attention_backend": ("bf16", "sdpa"),
    "attention_kernel": ("bf16", "sdpa"),
    "no_layout_copies": ("channels_last",),
    "group_norm_kernels": ("channels_last",),
    "fused_qkv": ("sdpa",),
    "fused_geglu": ("bf16",),
    "fused_add_norm": ("sdpa", "regional_compile"),
    "inductor_tuning": ("sdpa", "compile"),
    "prompt_projections": ("sdpa",),
    "compile": ("sdpa",),
    "regional_compile": ("sdpa",),
    "int8_dynamic": ("bf16", "sdpa", "regional_compile"),
    "int8_rows": ("bf16", "sdpa", "regional_compile"),
    "fp8_rows": ("bf16", "sdpa", "regional_compile"),
    "upcast_vae": ("bf16",),
    "int8_weight_only": ("bf16",),
    "fp8_weight_only": ("bf16",),
    "int4_weight_only": ("bf16",),
    "layerwise_casting": ("bf16",),
    "int8_convolutions": ("bf16", "channels_last", "regional_compile"),
    "fp8_convolutions": ("bf16", "channels_last", "regional_compile"),
}
TWINS = {"pixart-sigma", "flux-schnell"}  # their networks are those of pixart-alpha and flux-dev
APPLICABLE = [
    (model, name)
    for model in NAMES
    if model not in TWINS
    for name, known in OPTIMIZATIONS.items()
    # ahead_of_time would compile in earnest, and has tests of its own
    if name != "ahead_of_time"
    and (model, name) != ("sana", "vae_tiling")  # a picture of this size is a single tile
    and known.least_batch == 1
    and "cpu" in known.devices
    and not known.model_needs.endswith("hub_id")
    and plan.applies(known, MODELS[model])
]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_parameters_that_were_published(name: str) -> None:
    for part, published in PUBLISHED[name].items():
        config = json.loads((PACKAGE / "configs" / MODELS[name].configs / f"{part}.json").read_text())
        with torch.device("meta"):
            network = pipeline._from_config(config)
        assert sum(parameter.numel() for parameter in network.parameters()) == published
    assert MODELS[name].parameters == PUBLISHED[name][MODELS[name].denoiser]


@pytest.mark.parametrize("name", NAMES)
def test_a_miniature_paints_the_same_picture_every_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, applied = small(name, tmp_path, monkeypatch)
    assert applied == {}
    assert type(made.pipe) is getattr(diffusers, MODELS[name].pipeline)
    first, second = (call(made)[0] for _ in range(2))
    assert first.size == (made.model.width, made.model.height)
    assert first.getbbox() is not None
    assert first.tobytes() == second.tobytes()


@pytest.fixture(scope="module")
def plain_pictures() -> dict[str, torch.Tensor]:
    return {}


@pytest.mark.parametrize(("model", "name"), APPLICABLE)
def test_an_optimization_applies_and_the_picture_stays(
    model: str, name: str, plain_pictures: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    if model not in plain_pictures:
        plain_pictures[model] = pixels(small(model, tmp_path, monkeypatch)[0])
    plain = plain_pictures[model]
    found = pixels(small(model, tmp_path, monkeypatch, *BESIDE.get(name, ()), name)[0])
    known = OPTIMIZATIONS[name]
    # A tile of these pictures is 4 latents wide, and its group norms know no more than that.
    limit = 0.4 if name == "vae_tiling" else 0.02 if known.lossless else 0.1
    assert (found - plain).norm() / plain.norm() < limit


@pytest.mark.parametrize("ladder", LADDERS)
def test_no_ladder_has_a_transformer_do_what_changes_a_unet(ladder: str) -> None:
    recipes, _ = plan.find_ladder(ladder, H100, MODELS["pixart-alpha"])
    assert len(recipes) > 1
    assert not {
        name for recipe in recipes for name in recipe.optimizations if OPTIMIZATIONS[name].model_needs == "unet"
    }


def test_what_changes_a_unet_is_refused_for_a_transformer() -> None:
    with pytest.raises(ValueError, match="can't be applied to pixart-alpha: it has no UNet"):
        plan_recipe(MODELS["pixart-alpha"], Recipe("mine", ("feature_reuse",)), CPU)


def small(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, steps: int = 4, pixels: int | None = None
) -> tuple[Build, dict[str, dict[str, Any]]]:
    model = miniature(name, folder)
    monkeypatch.setitem(MODELS, name, model)
    recipe = Recipe("mine", plan_recipe(model, Recipe("mine", names), CPU))
    ladder = plan_ladder(
        "mine", (recipe,), model, CPU, plan.Settings(weights="random", steps=steps, height=pixels, width=pixels)
    )
    return build_pipeline(ladder.rungs[0], lambda stage: None)


def test_the_deep_compression_autoencoder_decodes_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tiled = (small("sana", tmp_path, monkeypatch, *names, pixels=256)[0] for names in ((), ("vae_tiling",)))
    assert (pixels(tiled) - pixels(whole)).norm() / pixels(whole).norm() < 0.4
    assert tiled.proofs["vae_tiling"]() == {"tiled_pictures": 1}


def pixels(build: Build) -> torch.Tensor:
    with torch.no_grad():
        return torch.tensor(list(call(build)[0].tobytes())).float()
