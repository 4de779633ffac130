"""Group norms by our own operation: where they are put, what becomes part of them, and that the picture stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from diffusion_fast import eight_bits, norms, onestep, operators
from diffusion_fast.optimizations import OPTIMIZATIONS, compilation
from diffusion_fast.pipeline import call
from tests.conftest import planned
from tests.test_onestep import recorded_in
from tests.test_optimizations import build


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def block(**changes: Any) -> ResnetBlock2D:
    torch.manual_seed(0)
    given: dict[str, Any] = {"in_channels": 32, "out_channels": 64, "temb_channels": 24, "groups": 8}
    made = ResnetBlock2D(**(given | changes)).eval()
    for parameter in made.parameters():  # no weight of one, no bias of nought: each has to show
        parameter += 0.2 * torch.randn_like(parameter)
    return made.to(memory_format=torch.channels_last)


def images(*shape: int) -> torch.Tensor:
    return operators.channels_last(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("changes", "with_silu"),
    [
        ({}, 2),
        ({"out_channels": 32}, 2),
        ({"skip_time_act": True, "output_scale_factor": 2.0}, 2),
        ({"temb_channels": None}, 2),
        ({"temb_channels": None, "time_embedding_norm": "group"}, 2),  # as the VAE's decoder has them
        ({"time_embedding_norm": "scale_shift"}, 0),
        ({"non_linearity": "gelu"}, 0),
        ({"dropout": 0.5}, 0),
        ({"up": True}, 0),
        ({"down": True}, 0),
    ],
    ids=str,
)
def test_a_residual_block_computes_what_it_did(changes: dict[str, Any], with_silu: int) -> None:
    made = block(**changes)
    temb = None if changes.get("temb_channels", 24) is None else torch.randn(2, 24)
    image = images(2, 32, 6, 10)
    before = made(image, temb)
    parameters = {id(each) for each in made.parameters()}
    names = set(dict(made.named_modules()))
    assert norms.replace_group_norms(torch.nn.Sequential(made)) == {"group_norms": 2, "with_silu": with_silu}
    assert isinstance(made.norm1, norms.ImageGroupNorm) and isinstance(made.norm2, norms.ImageGroupNorm)
    assert isinstance(made, ResnetBlock2D) and {id(each) for each in made.parameters()} == parameters
    assert set(dict(made.named_modules())) == names
    after = made(image, temb)
    assert after.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert norms.replace_group_norms(made) == {"group_norms": 0, "with_silu": 0}  # there is nothing left


def test_a_wrapped_convolution_keeps_its_bias() -> None:
    made = block()
    made.conv1 = torch.nn.Sequential(made.conv1)  # as an adapter's layer would stand there
    image, temb = images(2, 32, 6, 10), torch.randn(2, 24)
    before = made(image, temb)
    norms.replace_group_norms(made)
    assert made.conv1[0].bias is not None
    torch.testing.assert_close(made(image, temb), before, rtol=1e-4, atol=1e-4)


def test_every_group_norm_of_an_image_is_replaced_and_the_picture_stays() -> None:
    plain, _ = build("channels_last")
    made, applied = build("channels_last", "group_norm_kernels")
    networks = (made.pipe.unet, made.pipe.vae.decoder)
    left = [
        name
        for network in networks
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.GroupNorm)
    ]
    assert left == ["mid_block.attentions.0.group_norm"]  # of the decoder: of tokens
    blocks = sum(isinstance(module, ResnetBlock2D) for network in networks for module in network.modules())
    transformers = sum(type(module).__name__ == "Transformer2DModel" for module in made.pipe.unet.modules())
    account = {"group_norms": 2 * blocks + transformers + 2, "with_silu": 2 * blocks + 2}
    assert applied["group_norm_kernels"] == account
    assert not any(isinstance(network.conv_act, torch.nn.SiLU) for network in networks)
    before, after = (torch.tensor(list(call(each)[0].tobytes())) for each in (plain, made))
    assert (before - after).abs().max() <= 1
    with pytest.raises(RuntimeError, match="neither the denoiser nor the VAE's decoder has a group norm"):
        OPTIMIZATIONS["group_norm_kernels"].apply(made)  # all are replaced already


def test_one_step_loses_no_more_than_bf16_does() -> None:
    reference, _ = build(steps=7)
    steps = recorded_in(reference, {"bfloat16"})
    made, _ = build("bf16", "sdpa", "channels_last", "group_norm_kernels", steps=7)
    found = onestep.compare(made.spec, onestep.replay(made, steps), steps)
    assert found["ok"] is True
    assert made.proofs["bf16"]() == {"dtype": "bfloat16"}


def test_blocks_are_compiled_as_before_and_norms_need_no_compiler(by_eager: list[dict[str, Any]]) -> None:
    plain, _ = build("channels_last")
    made, applied = build("channels_last", "no_layout_copies", "group_norm_kernels", "regional_compile")
    before, after = (torch.tensor(list(call(each)[0].tobytes())) for each in (plain, made))
    assert (before - after).abs().max() <= 1
    regions = applied["regional_compile"]["regions"]
    assert regions == {"NormedResnetBlock2D": 11, "BasicTransformerBlock": 5, "Downsample2D": 2, "Upsample2D": 2}
    found = made.proofs["regional_compile"]()
    assert found["graph_breaks"] == 0 and found["graphs"] < sum(regions.values())  # blocks of one shape share a graph


def test_eight_bit_convolutions_are_given_what_the_norm_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = build("bf16", "channels_last", "group_norm_kernels")
    before = torch.tensor(list(call(made)[0].tobytes()))
    convolutions = eight_bits.quantizable_convolutions(made.pipe.unet).values()
    eight_bits.quantize_convolutions(made.pipe.unet, convolutions, torch.float8_e4m3fn)
    assert len(convolutions) > 20
    first = next(module for module in made.pipe.unet.modules() if isinstance(module, norms.NormedResnetBlock2D))
    assert isinstance(first.conv1, eight_bits.ImagewiseConvolution)
    assert first.conv1.bias is None and first.norm2.x_bias is not None
    image, temb = images(2, first.in_channels, 8, 8).bfloat16(), torch.randn(2, first.time_emb_proj.in_features)
    fused = first(image, temb.bfloat16())
    monkeypatch.setattr(norms, "ImagewiseConvolution", ())  # so that none is known for what it is: two steps then
    apart = first(image, temb.bfloat16())
    monkeypatch.undo()
    assert not torch.equal(fused, apart)  # in two steps the norm's result is rounded to bf16 in between
    assert (fused - apart).double().norm() < 0.02 * apart.double().norm()
    after = torch.tensor(list(call(made)[0].tobytes()))
    assert (before - after).abs().double().mean() < 8


def test_it_is_lossless_and_wants_channels_last() -> None:
    known = OPTIMIZATIONS["group_norm_kernels"]
    assert known.lossless and known.requires == (("channels_last",),)
    ladder = [spec.recipe for spec in planned("fast").rungs]
    assert ladder[ladder.index("layout") + 1] == "norms"
    assert issubclass(norms.NormedResnetBlock2D, ResnetBlock2D) and ResnetBlock2D.__name__ in compilation.BLOCKS
