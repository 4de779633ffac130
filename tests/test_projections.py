"""What is projected once for each prompt instead of in every step, and that no other prompt's is ever used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig

from diffusion_fast import onestep, projections, roofline
from diffusion_fast.graphs import Graphed
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, compilation, layers
from diffusion_fast.pipeline import _from_configs, call, call_for
from diffusion_fast.plan import plan_recipe
from diffusion_fast.projections import Projection, PromptProjections
from diffusion_fast.recipes import LOSSLESS
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned
from tests.test_eight_bits import eight_bit
from tests.test_graphs import CHANGES, Host, captured, pictures, record
from tests.test_onestep import recorded_in
from tests.test_optimizations import build

FUSED = ("sdpa", "fused_qkv")
BLOCKS = 5  # of the bundled UNet, each with one cross-attention


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def found_in(made: Build) -> list[Projection]:
    return [module for module in made.denoiser.modules() if isinstance(module, Projection)]


def calls_of(made: Build) -> list[Any]:
    """The prompts that the projecting layers are given from now on, by one of these layers."""
    seen: list[Any] = []
    found_in(made)[0].layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


def hoisted(made: Build) -> PromptProjections:
    (_, owner, _) = made.prompt_calls[0]
    assert isinstance(owner, PromptProjections)
    return owner


@pytest.mark.parametrize(("names", "each"), [((), 2), (("sdpa",), 2), (FUSED, 1)])
def test_pixels_are_the_same_and_each_layer_computes_once_a_call(names: tuple[str, ...], each: int) -> None:
    plain, (made, applied) = build(*names, steps=4)[0], build(*names, "prompt_projections", steps=4)
    assert applied["prompt_projections"]["projections"] == len(found_in(made)) == BLOCKS * each
    call(made)  # the shape's first call also finds out how large the buffers have to be
    seen = calls_of(made)
    assert pictures(made) == pictures(plain)
    assert pictures(made, prompt="a small blue star") == pictures(plain, prompt="a small blue star")
    assert len(seen) == 2
    assert made.proofs["prompt_projections"]() == {"projected": 3, "steps": 12}


def test_only_what_cross_attention_projects_of_the_prompt_is_taken() -> None:
    made, _ = build(*FUSED, "prompt_projections")
    names = {name for name, module in made.denoiser.named_modules() if isinstance(module, Projection)}
    assert len(names) == BLOCKS
    assert all(name.endswith("attn2.to_kv") for name in names)
    assert "made" not in {key.rpartition(".")[2] for key in made.denoiser.state_dict()}


def test_whatever_changes_between_calls_the_pixels_are_those_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = build(*FUSED)[0], captured(*FUSED, "prompt_projections", monkeypatch=monkeypatch)
    for change in (*CHANGES, *reversed(CHANGES)):
        assert pictures(made, **change) == pictures(plain, **change), change
    account = made.proofs["cuda_graph"]()
    calls = 2 * len(CHANGES)
    # With and without guidance, and with two images: captured once, launched once a call.
    assert account["unet prompt"] == {"captures": 3, "replays": calls, "eager_calls": 0}
    assert hoisted(made).projected == calls


def test_a_recording_finds_its_buffers_where_they_were_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph reads and fills the memory that it was captured with, whatever the layers hold by then."""
    made = captured(*FUSED, "prompt_projections", monkeypatch=monkeypatch)
    buffers: list[list[int]] = []

    def there(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        replay, outputs = record(function)
        captured_with = [projection.made for projection in found_in(made)]
        buffers.append([buffer.data_ptr() for buffer in captured_with if buffer is not None])

        def replay_there() -> None:
            now = [projection.made for projection in found_in(made)]
            assert all(one is other for one, other in zip(now, captured_with, strict=True))
            replay()

        return replay_there, outputs

    for graphed in (made.denoiser.forward, hoisted(made).project):
        assert isinstance(graphed, Graphed)
        graphed.record = there
    for change in (*CHANGES, *CHANGES):
        pictures(made, **change)
    step, prompt = made.denoiser.forward.account(), made.proofs["cuda_graph"]()["unet prompt"]
    assert (step["captures"], prompt["captures"]) == (4, 3)  # a step knows its picture's size, too
    assert len({tuple(each) for each in buffers}) == 3
    assert sum(map(len, buffers)) == 7 * BLOCKS


def given(prompt: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the bundled UNet is called with."""
    rows = len(prompt)
    added = {"text_embeds": torch.ones(rows, 64), "time_ids": torch.ones(rows, 6)}
    return (torch.ones(rows, 4, 8, 8), torch.tensor(17.0)), {
        "added_cond_kwargs": added,
        "encoder_hidden_states": prompt,
    }


def both(plain: Build, made: Build) -> Callable[[torch.Tensor], None]:
    def check(prompt: torch.Tensor) -> None:
        args, kwargs = given(prompt)
        assert torch.equal(made.denoiser(*args, **kwargs)[0], plain.denoiser(*args, **kwargs)[0])

    return check


def test_a_prompt_changed_in_place_of_another_length_or_by_position_is_noticed() -> None:
    plain, made = build(*FUSED)[0], build(*FUSED, "prompt_projections")[0]
    check = both(plain, made)
    prompt = torch.rand(2, 77, 128)
    check(prompt)
    before = hoisted(made).projected
    check(prompt)
    assert hoisted(made).projected == before
    for change in (prompt.mul_, prompt[:1].add_, prompt.view(-1).sub_):  # also by way of a view
        change(0.5)
        check(prompt)
    assert hoisted(made).projected == before + 3
    check(torch.rand(2, 154, 128))
    check(prompt)  # back again
    check(torch.rand(3, 77, 128))
    (sample, timestep), kwargs = given(prompt + 1)
    text = kwargs.pop("encoder_hidden_states")
    one, other = (each.denoiser(sample, timestep, text, **kwargs)[0] for each in (made, plain))
    assert torch.equal(one, other)


def test_an_identity_that_is_used_again_is_no_prompt_seen_before() -> None:
    plain, made = build(*FUSED)[0], build(*FUSED, "prompt_projections")[0]
    check = both(plain, made)
    for _ in range(8):  # each is freed before the next is made, were it not held
        check(torch.rand(2, 77, 128))


def test_inference_mode_counts_no_versions_so_each_step_projects() -> None:
    plain, made = build(*FUSED)[0], build(*FUSED, "prompt_projections")[0]
    check = both(plain, made)
    with torch.inference_mode():
        prompt = torch.rand(2, 77, 128)
        check(prompt)
        prompt.mul_(2)
        check(prompt)
    assert hoisted(made).projected == 2
    check(torch.rand(2, 77, 128))  # buffers that were made there can be filled here


def test_past_the_most_shapes_the_layers_compute_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "MOST", 2)
    plain, made = build(*FUSED)[0], build(*FUSED, "prompt_projections")[0]
    check = both(plain, made)
    for length in (4, 5, 6, 4, 7, 5):
        check(torch.rand(2, length, 128))
    assert len(hoisted(made).kept) == 2
    assert hoisted(made).projected == 4


def test_what_fails_halfway_is_done_again() -> None:
    plain, made = build(*FUSED)[0], build(*FUSED, "prompt_projections")[0]
    check = both(plain, made)
    prompt = torch.rand(2, 77, 128)
    check(prompt)
    last = found_in(made)[-1]
    prompt.mul_(2)
    hook = last.layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        made.denoiser(*given(prompt)[0], **given(prompt)[1])
    hook.remove()
    check(prompt)


def test_a_copy_of_the_denoiser_has_its_own() -> None:
    plain, made = build(*FUSED)[0], build(*FUSED, "prompt_projections")[0]
    other = copy.deepcopy(made)
    for each in (made, other, made):
        both(plain, each)(torch.rand(2, 77, 128))
    assert not {id(each) for each in found_in(made)} & {id(each) for each in found_in(other)}


def test_blocks_of_one_shape_share_a_graph() -> None:
    pixels, numbers = [], []
    for names in (FUSED, (*FUSED, "prompt_projections")):
        made, _ = build(*names, steps=3)
        compiled: list[Any] = []

        def backend(graph: Any, _: Any, compiled: list[Any] = compiled) -> Any:
            compiled.append(graph)
            return graph.forward

        blocks = [each for each in made.denoiser.modules() if type(each).__name__ == "BasicTransformerBlock"]
        with torch._dynamo.config.patch(recompile_limit=compilation.MOST_GRAPHS):
            for block in blocks:
                block.compile(backend=backend, fullgraph=True, dynamic=False)
            pixels.append(pictures(made))
            numbers.append(len(compiled))
            pictures(made, prompt="a small blue star")
            assert len(compiled) == numbers[-1]
            pictures(made, guidance_scale=1.0)
            pictures(made)
            assert len(compiled) == 2 * numbers[-1]
    assert pixels[0] == pixels[1]
    assert numbers[0] == numbers[1] < len(blocks) == BLOCKS


@pytest.mark.parametrize("name", ["fp8_rows", "int8_rows"])
def test_what_is_hoisted_stays_in_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = eight_bit(name, monkeypatch, "fused_qkv", steps=3)
    made, applied = eight_bit(name, monkeypatch, "fused_qkv", "prompt_projections", steps=3)
    assert {type(each.layer) for each in found_in(made)} == {torch.nn.Linear}
    assert applied["prompt_projections"]["projections"] == BLOCKS
    assert pictures(made) == pictures(plain)


def test_int8_dynamic_is_hoisted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("fused_qkv", "prompt_projections")
    (plain, _), (made, _) = (eight_bit("int8_dynamic", monkeypatch, *names[:number]) for number in (1, 2))
    assert len(found_in(made)) == BLOCKS
    assert pictures(made) == pictures(plain)


@pytest.mark.parametrize("graphed", [False, True])
def test_guidance_that_ends_is_projected_once_more(graphed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*FUSED, "guidance_cutoff", "feature_forecast")
    if graphed:
        plain = captured(*names, monkeypatch=monkeypatch, steps=8)
        made = captured(*names, "prompt_projections", monkeypatch=monkeypatch, steps=8)
    else:
        plain, made = build(*names, steps=8)[0], build(*names, "prompt_projections", steps=8)[0]
    for number in (1, 2):
        assert pictures(made) == pictures(plain)
        assert made.proofs["prompt_projections"]() == {"projected": 2 * number, "steps": 8 * number}
    if graphed:
        assert made.proofs["cuda_graph"]()["unet prompt"] == {"captures": 2, "replays": 4, "eager_calls": 0}


def test_each_row_of_a_batch_has_its_own_prompt() -> None:
    plain, made = build(*FUSED, batch_size=2)[0], build(*FUSED, "prompt_projections", batch_size=2)[0]
    for prompts in (["a red circle on a white background", "a blue star on a black background"], ["a", "b"]):
        one, other = (call_for(each, prompts, [1, 2]) for each in (made, plain))
        assert [image.tobytes() for image in one] == [image.tobytes() for image in other]


def test_recorded_steps_and_counted_operations_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(*FUSED, steps=3)[0]
    made = captured(*FUSED, "prompt_projections", monkeypatch=monkeypatch, steps=3)
    steps = recorded_in(plain, set())
    for one, other in zip(onestep.replay(made, steps), onestep.replay(plain, steps), strict=True):
        assert torch.equal(one, other)
    assert roofline.count_flops(made) == roofline.count_flops(plain)
    assert pictures(made) == pictures(plain)


def test_an_adapter_that_would_be_ignored_is_refused() -> None:
    made, _ = build("sdpa", "prompt_projections")
    with pytest.raises(RuntimeError, match="prompt_projections can't take an adapter any more"):
        made.denoiser.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))


def test_a_denoiser_that_is_not_given_the_prompt_as_it_is_is_refused() -> None:
    made, _ = build("sdpa")

    def changed(_: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].clone()}

    for block in made.denoiser.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block.register_forward_pre_hook(changed, with_kwargs=True)
    with pytest.raises(RuntimeError, match="no linear layer of UNet2DConditionModel is given the prompt as it is"):
        layers.prompt_projections(made)


@pytest.mark.parametrize(
    ("name", "argument", "position"), [("prompt_projections", "input", 0), ("time_projections", "temb", 1)]
)
def test_what_is_called_by_name_is_found_as_by_position(name: str, argument: str, position: int) -> None:
    made, _ = build("sdpa")

    def by_name(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[:position], kwargs | {argument: args[position]}

    kinds = {"input": lambda each: isinstance(each, torch.nn.Linear), "temb": lambda each: type(each) is ResnetBlock2D}
    for module in filter(kinds[argument], made.denoiser.modules()):
        module.register_forward_pre_hook(by_name, with_kwargs=True)
    found = getattr(layers, name)(made)["projections"]
    assert found == getattr(layers, name)(build("sdpa")[0])["projections"]


def test_a_prompt_that_is_another_in_every_step_is_named() -> None:
    made, _ = build("sdpa", "prompt_projections", steps=3)
    original = made.denoiser.forward
    made.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] + 0}),
        with_kwargs=True,
        prepend=True,
    )
    assert made.denoiser.forward == original
    call(made)
    with pytest.raises(RuntimeError, match="the prompt was projected 3 times in 3 steps"):
        made.proofs["prompt_projections"]()


def test_it_does_not_go_with_the_whole_denoiser_compiled() -> None:
    with pytest.raises(ValueError, match="compile"):
        plan_recipe(MODELS["tiny"], Recipe("mine", ("compile", "prompt_projections")), CPU)
    assert "prompt_projections" in plan_recipe(MODELS["sdxl"], LOSSLESS, H100)


def test_projecting_sdxls_prompt_is_70_layers_and_nothing_for_the_host() -> None:
    """At full size, on the device without memory: a capture would fail where the host is needed."""
    spec = replace(planned(model="sdxl", weights="random").rungs[0], device="meta")  # type: ignore[arg-type]
    made = Build(MODELS["sdxl"], spec)
    made.pipe = _from_configs(made)
    for name in FUSED:
        OPTIMIZATIONS[name].apply(made)
    unet = made.denoiser
    found = [module for name, module in unet.named_modules() if name.endswith("attn2.to_kv")]
    hoisted = PromptProjections(unet, found, position=2)
    assert len(hoisted.projections) == len(found) == 70
    prompt = torch.zeros(2, 77, 2048, device="meta")
    hoisted.before_step(unet, (), {"encoder_hidden_states": prompt})
    with Host() as host:
        hoisted.project(prompt)
    assert host.seen == []
    kept = sum(each.numel() for each in hoisted.kept[prompt.shape, prompt.dtype, prompt.device])
    assert kept == 2 * 77 * 2 * (10 * 640 + 60 * 1280)


def together(made: Build) -> projections.TimeProjections:
    (hook,) = made.denoiser.down_blocks[0]._forward_pre_hooks.values()
    return hook.__self__


def test_all_blocks_have_the_time_projected_by_one_product() -> None:
    plain, (made, applied) = build(steps=4)[0], build("time_projections", steps=4)
    blocks = [block for block in made.denoiser.modules() if isinstance(block, ResnetBlock2D)]
    assert applied["time_projections"]["projections"] == len(blocks) == len(found_in(made))
    products: list[Any] = []
    for projection in found_in(made):
        projection.layer.register_forward_pre_hook(lambda _, args: products.append(args[0]))
    found, expected = (torch.tensor(list(call(each)[0].tobytes())).float() for each in (made, plain))
    assert (found - expected).norm() / expected.norm() < 1e-3
    assert not products
    assert made.proofs["time_projections"]() == {}
    whole = together(made).weight
    for projection, part in zip(together(made).projections, whole.split(together(made).sizes), strict=True):
        assert projection.layer.weight.data_ptr() == part.data_ptr()  # nothing is there twice
        assert projection.made.shape == (2, projection.layer.out_features)
    assert sum(projection.layer.weight.numel() for projection in found_in(made)) == whole.numel()


def test_other_batches_and_times_are_projected_anew() -> None:
    made, plain = build("time_projections")[0].denoiser, build()[0].denoiser
    torch.manual_seed(0)
    for batch, time in ((2, 901.0), (2, 17.0), (4, 17.0), (2, 901.0)):
        given = {
            "sample": torch.randn(batch, 4, 16, 16),
            "timestep": torch.tensor(time),
            "encoder_hidden_states": torch.randn(batch, 77, plain.config.cross_attention_dim),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(batch, plain.config.projection_class_embeddings_input_dim - 6 * 32),
                "time_ids": torch.randn(batch, 6),
            },
        }
        torch.testing.assert_close(made(**given).sample, plain(**given).sample, rtol=1e-4, atol=1e-5)


def test_weights_that_are_loaded_or_moved_later_are_the_ones_that_count() -> None:
    made, _ = build("time_projections")
    shared, temb = together(made), torch.randn(2, 128)
    layers = [projection.layer for projection in shared.projections]

    def projected() -> torch.Tensor:
        shared.before_blocks(None, (), {"temb": temb})
        return shared.projections[3].made.clone()

    before = projected()
    for layer in layers:
        layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias + 1})
    loaded = projected()
    expected = torch.nn.functional.linear(torch.nn.functional.silu(temb), layers[3].weight, layers[3].bias)
    torch.testing.assert_close(loaded, expected)
    assert not torch.allclose(loaded, before)
    for layer in layers:
        layer.weight = torch.nn.Parameter(2 * layer.weight)  # elsewhere, as .to(device) leaves it
    torch.testing.assert_close(projected() - layers[3].bias, 2 * (expected - layers[3].bias), rtol=1e-4, atol=1e-4)
    assert layers[3].weight.data_ptr() == shared.weight.split(shared.sizes)[3].data_ptr()


@pytest.mark.parametrize("other", ["int8_weight_only", "layerwise_casting"])
def test_weights_that_are_stored_otherwise_are_refused_before_anything_loads(other: str) -> None:
    with pytest.raises(ValueError, match=f"time_projections and {other} exclude each other"):
        plan_recipe(MODELS["sdxl"], Recipe("mine", ("bf16", "sdpa", "time_projections", other)), H100)


def test_past_so_many_batches_each_block_projects_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "MOST", 1)
    made = build("time_projections")[0]
    shared, (first, *_) = together(made), found_in(made)
    for batch, kept in ((2, True), (3, False), (2, True)):
        shared.before_blocks(None, (), {"temb": torch.randn(batch, first.layer.in_features)})
        assert (first.made is not None) == kept


def test_the_buffers_of_a_batch_are_where_they_were_when_it_comes_again() -> None:
    made = build("time_projections")[0]
    shared, found = together(made), found_in(made)
    seen: dict[int, list[Any]] = {}
    for batch in (2, 4, 2, 1, 4):
        shared.before_blocks(None, (), {"temb": torch.randn(batch, found[0].layer.in_features)})
        now = [projection.made for projection in found]
        assert all(one is other for one, other in zip(now, seen.setdefault(batch, now), strict=True))
    assert len({buffers[0].data_ptr() for buffers in seen.values()}) == 3


@pytest.mark.parametrize(
    "names", [("feature_forecast",), ("feature_reuse",), ("bf16", "channels_last", "group_norm_kernels")]
)
def test_it_goes_with_what_leaves_blocks_out_or_norms_otherwise(names: tuple[str, ...]) -> None:
    found, plain = (
        torch.tensor(list(call(build(*names, *more, steps=6)[0])[0].tobytes())).float()
        for more in (("time_projections",), ())
    )
    assert (found - plain).norm() / plain.norm() < 0.02


def test_whatever_changes_a_captured_step_projects_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = build()[0], captured("time_projections", monkeypatch=monkeypatch)
    for change in CHANGES:
        found, expected = (np.frombuffer(pictures(each, **change), np.uint8).astype(int) for each in (made, plain))
        assert abs(found - expected).max() <= 1, change  # one product instead of eleven may round otherwise


def test_time_projections_are_for_unets() -> None:
    with pytest.raises(ValueError, match="time_projections can't be applied to pixart-alpha: it has no UNet"):
        plan_recipe(MODELS["pixart-alpha"], Recipe("mine", ("time_projections",)), CPU)
