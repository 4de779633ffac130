"""The parts of a call beside the denoiser, on the bundled model: how often they run, on what, and what they give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.loaders.lora_base import disable_lora_for_text_encoder, set_adapters_for_text_encoder
from peft import LoraConfig

from diffusion_fast import roofline, worker
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, left_out, parts, same_work
from diffusion_fast.pipeline import call, call_for
from diffusion_fast.plan import Settings, plan_ladder
from diffusion_fast.spec import Recipe
from tests.conftest import CPU
from tests.test_optimizations import build

PROMPT = "a small blue star on a black background"
CACHE = "prompt_embedding_cache"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def given_to(module: Any) -> list[tuple[int, ...]]:
    """Grows by the shape of its input each time that the module is called."""
    seen: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


def test_slices_are_decoded_one_by_one_and_the_pictures_stay() -> None:
    made, _ = build("sdpa", "vae_slicing", batch_size=3)
    decoded = given_to(made.pipe.vae.decoder)
    with pytest.raises(RuntimeError, match=r"vae_slicing: \[\] pictures"):
        made.proofs["vae_slicing"]()
    pictures = call(made)
    assert [shape[0] for shape in decoded] == [1, 1, 1]
    assert made.proofs["vae_slicing"]() == {"slices": 3}
    for one, other in zip(pictures, call(build("sdpa", batch_size=3)[0]), strict=True):
        difference = torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))
        assert difference.abs().max() <= 1


def test_slicing_a_batch_of_one_is_refused() -> None:
    recipe = Recipe("mine", ("vae_slicing",))
    with pytest.raises(ValueError, match="vae_slicing has no effect on a batch of 1: take 2 or more"):
        plan_ladder("run", (recipe,), MODELS["tiny"], CPU, Settings(batch_size=1))
    assert plan_ladder("run", (recipe,), MODELS["tiny"], CPU, Settings(batch_size=2)).rungs[0].batch_size == 2


def test_tiles_of_half_the_picture_overlap_and_cover_it() -> None:
    made, applied = build("sdpa", "vae_tiling", steps=8)
    assert applied["vae_tiling"] == {"tile_pixels": 64}
    decoded = given_to(made.pipe.vae.decoder)
    with pytest.raises(RuntimeError, match="nothing was decoded in tiles"):
        made.proofs["vae_tiling"]()
    (picture,) = call(made)
    whole = 128 // made.pipe.vae_scale_factor
    sides = [whole // 2, whole // 2, whole // 4]  # each begins three quarters of a tile behind the one before
    assert [shape[2:] for shape in decoded] == [(height, width) for height in sides for width in sides]
    assert made.proofs["vae_tiling"]() == {"tiled_pictures": 1}
    plain = torch.tensor(list(call(build("sdpa", steps=8)[0])[0].tobytes())).float()
    found = torch.tensor(list(picture.tobytes())).float()
    assert 0 < (found - plain).norm() / plain.norm() < 0.1


def test_tiles_of_large_pictures_have_512_pixels() -> None:
    made, _ = build()
    made.spec = replace(made.spec, height=2048, width=1024)
    assert OPTIMIZATIONS["vae_tiling"].apply(made) == {"tile_pixels": 512}
    assert made.pipe.vae.tile_latent_min_size == 512 // made.pipe.vae_scale_factor


def test_a_picture_of_one_tile_is_refused() -> None:
    made, _ = build(height=32, width=32)
    made.pipe.vae_scale_factor = 32
    with pytest.raises(RuntimeError, match="a picture of 32 pixels is no larger than the smallest tile, 128 pixels"):
        OPTIMIZATIONS["vae_tiling"].apply(made)


def test_the_deep_compression_autoencoder_is_tiled_likewise() -> None:
    made, _ = build()
    small: dict[str, Any] = {
        "latent_channels": 4,
        "attention_head_dim": 2,
        "encoder_block_types": ("ResBlock",) * 2,
        "decoder_block_types": ("ResBlock",) * 2,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
    }
    made.pipe.vae = AutoencoderDC(**small)
    made.pipe.vae_scale_factor = made.pipe.vae.spatial_compression_ratio
    assert OPTIMIZATIONS["vae_tiling"].apply(made) == {"tile_pixels": 64}
    decoded = given_to(made.pipe.vae.decoder)
    scale = made.pipe.vae_scale_factor
    latents = torch.rand(1, 4, 128 // scale, 128 // scale)
    assert made.pipe.vae.decode(latents).sample.shape == (1, 3, 128, 128)
    assert len(decoded) == 9
    assert max(shape[2] for shape in decoded) == 64 // scale
    assert made.proofs["vae_tiling"]() == {"tiled_pictures": 1}


def test_a_repeated_prompt_is_encoded_once_and_gives_the_same_picture() -> None:
    made, applied = build("sdpa", CACHE)
    plain, _ = build("sdpa")
    encoded = [given_to(encoder) for encoder in (made.pipe.text_encoder, made.pipe.text_encoder_2)]
    assert applied[CACHE] == {"text_encoders": 2}
    assert call(made)[0].tobytes() == call(plain)[0].tobytes()
    with pytest.raises(RuntimeError, match="1 prompts were encoded, and none was reused"):
        made.proofs[CACHE]()
    before = [len(each) for each in encoded]
    assert call(made)[0].tobytes() == call(plain)[0].tobytes()
    assert [len(each) for each in encoded] == before
    assert made.proofs[CACHE]() == {"encoded": 1, "reused": 1}
    # Another prompt is another picture, the pipeline's own, and the first one is still known.
    other = call_for(made, [PROMPT], [3])[0].tobytes()
    assert other == call_for(plain, [PROMPT], [3])[0].tobytes()
    assert other != call_for(made, [made.spec.prompt], [3])[0].tobytes()
    assert made.proofs[CACHE]() == {"encoded": 3, "reused": 1}  # each in a list is another argument
    assert call(made)[0].tobytes() == call(plain)[0].tobytes()
    assert made.proofs[CACHE]()["encoded"] == 3


def test_what_the_caller_does_to_embeddings_stays_with_the_caller() -> None:
    made, _ = build(CACHE)
    first = made.pipe.encode_prompt(prompt=PROMPT)[0]
    kept = first.clone()
    first.zero_()
    assert made.pipe.encode_prompt(prompt=PROMPT)[0].equal(kept)


def test_embeddings_of_ones_own_are_left_to_the_pipeline() -> None:
    made, _ = build(CACHE)
    given = made.pipe.encode_prompt(prompt=PROMPT)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    again = made.pipe.encode_prompt(prompt=None, **dict(zip(names, given, strict=True)))
    assert all(one.equal(other) for one, other in zip(given, again, strict=True))
    assert len(made.pipe.encode_prompt.kept) == 1


def test_an_adapter_of_a_text_encoder_has_prompts_encoded_anew() -> None:
    made, _ = build(CACHE)
    encoder = made.pipe.text_encoder
    plain = made.pipe.encode_prompt(prompt=PROMPT)[0]
    torch.manual_seed(0)
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "one")
    adapted = made.pipe.encode_prompt(prompt=PROMPT)[0]
    assert not adapted.equal(plain)
    for module in encoder.modules():
        if hasattr(module, "scaling"):
            module.scaling["one"] *= 2
    assert not made.pipe.encode_prompt(prompt=PROMPT)[0].equal(adapted)
    encoder.disable_adapters()
    assert made.pipe.encode_prompt(prompt=PROMPT)[0].equal(plain)


def test_adapters_that_a_pipeline_switches_by_way_of_the_layers_have_prompts_encoded_anew() -> None:
    made, _ = build(CACHE)
    encoder = made.pipe.text_encoder
    plain = made.pipe.encode_prompt(prompt=PROMPT)[0]
    torch.manual_seed(0)
    for name in ("one", "two"):
        encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name)
    pictures = []
    for name in ("one", "two"):
        set_adapters_for_text_encoder([name], encoder)
        pictures.append(made.pipe.encode_prompt(prompt=PROMPT)[0])
    assert not pictures[0].equal(pictures[1])
    disable_lora_for_text_encoder(encoder)
    assert made.pipe.encode_prompt(prompt=PROMPT)[0].equal(plain)


def test_a_word_that_is_added_has_prompts_encoded_anew() -> None:
    made, _ = build(CACHE)
    encoder = made.pipe.text_encoder
    before = made.pipe.encode_prompt(prompt=PROMPT)[0]
    words = encoder.get_input_embeddings()
    encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(words.weight + 1))
    assert not made.pipe.encode_prompt(prompt=PROMPT)[0].equal(before)


def test_no_more_prompts_are_kept_than_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MOST_PROMPTS", 2)
    kept = parts.KeptEmbeddings(lambda prompt: torch.ones(1), [])
    for prompt in ("a", "b", "c", "a"):
        kept(prompt)
    assert (kept.encoded, kept.reused, len(kept.kept)) == (4, 0, 2)
    kept("c")
    assert kept.reused == 1


def test_that_timed_calls_are_without_text_encoding_is_said_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("mine", ("sdpa", CACHE))
    ladder = plan_ladder("run", (recipe,), MODELS["tiny"], CPU, Settings())
    assert (
        f"{CACHE} leaves text encoding out of what is timed: calls that repeat a prompt do without it" in ladder.notes
    )
    assert "without the time of text encoding" in OPTIMIZATIONS[CACHE].summary
    assert left_out(recipe.optimizations) == {"text_encoding"}
    assert same_work(recipe.optimizations)  # of a step: the pictures are the same
    made, plain = build("sdpa", CACHE)[0], build("sdpa")[0]
    monkeypatch.setattr(roofline, "ceilings", lambda _: {"matmul_ceiling_tflops": 1.0, "copy_ceiling_gbs": 1.0})
    flops = roofline.count_flops(plain)
    with_it, without = (roofline.limits(each, flops, 1.0)["tflop"] for each in (plain, made))
    assert with_it - without == pytest.approx(sum(flops["text_encoding"].values()) / 1e12)
    assert not any(name.startswith("text_encoder") for name, *_ in made.launched())  # by no graph either
    phases, _ = worker._phases(made)
    assert phases["text_encoding_s"] < 0.1 * phases["vae_decode_s"]
