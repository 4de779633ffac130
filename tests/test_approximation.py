"""What the approximations leave out, on the bundled model: which steps, and which rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

from diffusion_fast import plan
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, approximation, same_work
from diffusion_fast.optimizations.approximation import REUSE_EVERY, ReusedFeatures
from diffusion_fast.pipeline import _from_configs, call, call_for
from diffusion_fast.plan import plan_recipe
from diffusion_fast.spec import Recipe
from tests.conftest import H100, planned
from tests.test_models import pixels, small
from tests.test_optimizations import build


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def calls_of(module: Any) -> list[int]:
    """Grows by the number of rows each time that the module is called."""
    seen: list[int] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    return seen


def test_deep_blocks_compute_every_third_step_and_the_outermost_all() -> None:
    made, applied = build("sdpa", "feature_reuse", steps=7)
    middle, last = calls_of(made.denoiser.mid_block), calls_of(made.denoiser.up_blocks[-1])
    call(made)
    assert (len(middle), len(last)) == (3, 7)
    assert made.proofs["feature_reuse"]() == {"full_steps": 3, "shallow_steps": 4}
    assert applied["feature_reuse"] == {"every": REUSE_EVERY}
    call(made)  # a new trajectory starts with a full step, wherever the one before has ended
    assert len(middle) == 6
    made.pipe.scheduler = DPMSolverMultistepScheduler.from_config(made.pipe.scheduler.config)
    call(made)  # and whoever schedules it
    assert len(middle) == 9
    assert not same_work(made.spec.optimizations)


def test_with_its_own_features_a_shallow_step_is_a_full_one() -> None:
    """What is left out is what was kept: then nothing else may differ, for any layout of first and last blocks."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 2,
    }
    attending = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 12}
    up = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4}
    for unet, added in (
        (build("sdpa")[0].denoiser, {"time_ids": torch.ones(2, 6)}),
        (UNet2DConditionModel(**small, **attending, **up), None),
    ):
        if added:
            wide = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
            added["text_embeds"] = torch.rand(2, wide)
        text = torch.rand(2, 5, unet.config.cross_attention_dim)
        given = torch.rand(2, 4, 8, 8), torch.tensor(17.0), text
        expected = unet(*given, added_cond_kwargs=added, return_dict=False)[0]
        reused = ReusedFeatures(unet, every=3, points=1)
        assert torch.equal(reused(*given, added_cond_kwargs=added)[0], expected)
        assert torch.equal(reused(*given, added_cond_kwargs=added)[0], expected)
        assert (reused.full_steps, reused.shallow_steps) == (1, 1)
        other = reused(torch.rand(2, 4, 8, 8), *given[1:], added_cond_kwargs=added)[0]
        assert not torch.allclose(other, expected)


def test_a_forecast_lies_on_the_parabola_through_the_last_three_full_steps() -> None:
    made, applied = build("sdpa", "feature_forecast", steps=8)
    entering: list[torch.Tensor] = []
    made.denoiser.up_blocks[-1].register_forward_pre_hook(
        lambda _, args, kwargs: entering.append(kwargs["hidden_states"].double()), with_kwargs=True
    )
    call(made)
    assert made.proofs["feature_forecast"]() == {"full_steps": 4, "shallow_steps": 4}
    assert torch.equal(entering[1], entering[0])  # one point is no line yet
    torch.testing.assert_close(entering[3], entering[2] + (entering[2] - entering[0]) / 2, rtol=1e-5, atol=1e-5)
    for step in (5, 7):
        points = [entering[step - back].flatten().numpy() for back in (5, 3, 1)]
        parabola = np.polynomial.polynomial.polyfit((-5, -3, -1), points, 2)
        expected = torch.tensor(parabola[0]).reshape(entering[step].shape)  # at 0
        torch.testing.assert_close(entering[step], expected, rtol=1e-4, atol=1e-4)
    assert applied["feature_forecast"] == {"every": 2}


def test_what_changes_the_blocks_between_is_refused() -> None:
    made, _ = build("sdpa", "feature_reuse")
    with pytest.raises(TypeError, match="mid_block_additional_residual"):
        made.denoiser(torch.rand(2, 4, 16, 16), 1, torch.rand(2, 77, 128), mid_block_additional_residual=torch.rand(1))


def test_guidance_ends_after_half_of_the_steps_with_the_prompt_of_each_row() -> None:
    made, applied = build("sdpa", "guidance_cutoff", steps=4, batch_size=2)
    rows = calls_of(made.denoiser.up_blocks[-1])
    prompts = ["a red circle on a white background", "a blue star on a black background"]
    both = call_for(made, prompts, [1, 2])
    assert rows == [4, 4, 2, 2]
    assert applied["guidance_cutoff"] == {"guided_steps": 2, "steps": 4}
    assert made.proofs["guidance_cutoff"]() == {"guided_steps": 2}
    # Each row goes on with its own prompt: a batch gives what its prompts give alone.
    alone = replace(made, spec=replace(made.spec, batch_size=1))
    for prompt, seed, picture in zip(prompts, (1, 2), both, strict=True):
        (single,) = call_for(alone, [prompt], [seed])
        difference = torch.tensor(list(picture.tobytes())) - torch.tensor(list(single.tobytes()))
        assert difference.abs().max() <= 2


def test_both_together_compute_in_full_where_the_rows_change() -> None:
    made, _ = build("sdpa", "feature_reuse", "guidance_cutoff", steps=8)
    middle = calls_of(made.denoiser.mid_block)
    call(made)
    assert middle == [2, 2, 1, 1]  # steps 0, 3, 4 (guidance has ended) and 6
    assert approximation.GUIDED == 0.5


def small_pixart(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, steps: int = 10) -> tuple[Build, Any]:
    return small("pixart-alpha", folder, monkeypatch, *names, steps=steps)


def test_the_first_block_alone_computes_in_steps_in_which_it_adds_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pixels(small_pixart(tmp_path, monkeypatch)[0])
    monkeypatch.setattr(approximation, "FIRST_BLOCK_CHANGE", 10.0)  # however much it changes
    made, applied = small_pixart(tmp_path, monkeypatch, "first_block_cache")
    first, second = (calls_of(block.ff.net[2]) for block in made.denoiser.transformer_blocks)
    assert applied["first_block_cache"] == {"threshold": 10.0, "blocks": 1}
    found = pixels(made)
    assert (len(first), len(second)) == (10, 1)
    assert made.proofs["first_block_cache"]() == {"computed": 1, "skipped": 9}
    assert 0 < (found - plain).norm() / plain.norm() < 0.1
    assert pixels(made).equal(found)  # a new trajectory starts in full
    assert len(second) == 2
    assert not same_work(made.spec.optimizations)


def test_a_cache_that_never_serves_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pixels(small_pixart(tmp_path, monkeypatch)[0])
    monkeypatch.setattr(approximation, "FIRST_BLOCK_CHANGE", -1.0)
    made, _ = small_pixart(tmp_path, monkeypatch, "first_block_cache")
    assert pixels(made).equal(plain)  # where nothing is reused, nothing differs
    with pytest.raises(RuntimeError, match="first_block_cache: all of 1 modules were computed in each of 10 calls"):
        made.proofs["first_block_cache"]()


def test_attention_serves_several_steps_but_the_first_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pixels(small_pixart(tmp_path, monkeypatch)[0])
    made, applied = small_pixart(tmp_path, monkeypatch, "pyramid_attention_broadcast")
    assert applied["pyramid_attention_broadcast"] == {"attention_layers": 4, "spatial": 2, "cross": 6}
    block = made.denoiser.transformer_blocks[0]
    projected = {name: calls_of(getattr(block, name).to_out[0]) for name in ("attn1", "attn2")}
    found = pixels(made)
    times = made.pipe.scheduler.timesteps.tolist()
    least, most = approximation.BROADCAST_TIMES
    for name, every in (("attn1", 2), ("attn2", 6)):
        expected = [step for step, time in enumerate(times) if step % every == 0 or not least < time < most]
        assert len(projected[name]) == len(expected) < 10
    proof = made.proofs["pyramid_attention_broadcast"]()
    assert proof["computed"] == 2 * sum(map(len, projected.values()))  # in both blocks
    assert proof["computed"] + proof["skipped"] == 4 * 10
    assert 0 < (found - plain).norm() / plain.norm() < 0.1
    assert pixels(made).equal(found)


TRUE_GUIDANCE = {"negative_prompt": "blurred", "true_cfg_scale": 2.0}  # FLUX then calls its denoiser twice a step


def test_each_branch_of_guidance_is_served_what_it_computed_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = small("flux-dev", tmp_path, monkeypatch, "sdpa", "pyramid_attention_broadcast", steps=10)
    made.call_arguments |= TRUE_GUIDANCE
    layer = made.denoiser.transformer_blocks[0].attn
    computed, given = calls_of(layer.to_out[0]), []
    layer.register_forward_hook(lambda _, __, output: given.append(output[0]))
    found = pixels(made)
    times = made.pipe.scheduler.timesteps.tolist()
    least, most = approximation.BROADCAST_TIMES
    expected = [step for step, time in enumerate(times) if step % 2 == 0 or not least < time < most]
    assert len(given) == 2 * 10
    for branch in (given[::2], given[1::2]):
        assert [step for step in range(10) if step == 0 or branch[step] is not branch[step - 1]] == expected
    assert len({id(output) for output in given}) == len(computed) == 2 * len(expected) < 2 * 10
    proof = made.proofs["pyramid_attention_broadcast"]()
    assert proof["computed"] == 4 * 2 * len(expected)  # in two blocks of two streams, and two of one
    assert proof["computed"] + proof["skipped"] == 4 * 2 * 10
    made.pipe.scheduler = copy.deepcopy(made.pipe.scheduler)
    assert pixels(made).equal(found)
    assert made.proofs["pyramid_attention_broadcast"]()["computed"] == 2 * proof["computed"]


def test_a_pipeline_that_was_called_before_knows_of_the_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX names the branches of guidance to the hooks that diffusers has found, which were none in that call."""
    monkeypatch.setattr(approximation, "FIRST_BLOCK_CHANGE", 10.0)
    made, _ = small("flux-dev", tmp_path, monkeypatch, "sdpa")
    pixels(made)
    second = calls_of(made.denoiser.transformer_blocks[1].ff.net[2])
    OPTIMIZATIONS["first_block_cache"].apply(made)
    pixels(made)
    assert len(second) == 1


@pytest.mark.parametrize("name", ["first_block_cache", "pyramid_attention_broadcast"])
def test_what_skips_a_transformers_modules_is_refused_elsewhere_and_where_it_would_be_compiled(name: str) -> None:
    pixart = MODELS["pixart-alpha"]
    with pytest.raises(ValueError, match=f"{name} can't be applied to sdxl: it has no"):
        plan_recipe(MODELS["sdxl"], Recipe("mine", (name,)), H100)
    for other in ("compile", "regional_compile", "ahead_of_time", "cuda_graph"):
        with pytest.raises(ValueError, match="exclude each other"):
            plan_recipe(pixart, Recipe("mine", (name, other)), H100)
    other = replace(pixart, cacheable_blocks=False)
    assert ("transformer" in OPTIMIZATIONS[name].model_needs) == plan.applies(OPTIMIZATIONS[name], other)


def test_a_tiny_vae_decodes_sdxls_latents_to_the_same_size() -> None:
    """On the meta device: SDXL in full, with a decoder a thirtieth the size of its own."""
    spec = replace(planned(model="sdxl", weights="random").rungs[0], device="meta")  # type: ignore[arg-type]
    made = Build(MODELS["sdxl"], spec)
    assert OPTIMIZATIONS["tiny_vae"].apply(made) == {}
    made.pipe = _from_configs(made)
    assert made.proofs["tiny_vae"]() == {"vae": "random"}
    for name in ("sdpa", "channels_last", "fused_qkv"):
        OPTIMIZATIONS[name].apply(made)
    assert made.pipe.vae.decode(torch.zeros(1, 4, 128, 128, device="meta")).sample.shape == (1, 3, 1024, 1024)
    assert sum(parameter.numel() for parameter in made.pipe.vae.decoder.parameters()) < 83_653_863 / 30
    made.pipe.vae = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="tiny_vae: the pipeline decodes by Identity"):
        made.proofs["tiny_vae"]()
