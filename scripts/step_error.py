"""What one denoising step of a UNet with random weights loses in eight bits, where there is no GPU.

    python scripts/step_error.py --model sdxl --size 512

Relative L2 errors of the UNet's output, from pure noise, for one image without guidance; everything but the named
layers is in fp32, and nothing is fused: feed-forwards have scales a row. A GPU's record has a trajectory, guidance and
bf16 besides (`one_step_error`). SDXL takes 20 GiB, and on two cores at 1024 a minute a line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

import diffusion_fast
from diffusion_fast import eight_bits, norms, operators
from diffusion_fast.models import MODELS
from diffusion_fast.modules import replace_modules
from diffusion_fast.optimizations.quantization import LEAST_ROWS, worth_eight_bits

CONFIGS = Path(diffusion_fast.__file__).parent / "configs"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="sdxl", choices=("sdxl", "ssd-1b", "sd15"))
    parser.add_argument("--size", type=int, help="pixels a side [default: the model's]")
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    model = MODELS[options.model]
    config = json.loads((CONFIGS / model.configs / "unet.json").read_text())
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config).eval()
    given = inputs(config, (options.size or model.height) // 8)
    shapes: dict[Any, tuple[int, ...]] = {}

    def note(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes[layer] = tuple(inputs[0].shape)

    linears = [layer for layer in unet.modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in linears]
    exact = unet(**given)[0]
    for hook in hooks:
        hook.remove()

    def tell(what: str, layers: int) -> None:
        start = time.monotonic()
        error = ((unet(**given)[0] - exact).norm() / exact.norm()).item()
        print(f"{what:52} {layers:4} layers {error:8.2%} {time.monotonic() - start:6.0f} s", flush=True)

    attention = sum(isinstance(layer, Attention) for layer in unet.modules())
    for name, numbers in eight_bits.FORMATS.items():
        with attention_in(numbers):
            tell(f"{name}, attention", attention)

    norms.replace_group_norms(unet)
    found = eight_bits.quantizable_convolutions(unet)
    by_place: dict[str, list[torch.nn.Conv2d]] = {}
    for name, layer in found.items():
        place = "sampling layers" if "sampler" in name else f"residual blocks' {name.rpartition('.')[2]}"
        by_place.setdefault(place, []).append(layer)
    for place, chosen in (*sorted(by_place.items()), ("all convolutions", list(found.values()))):
        taken = swap(unet, chosen)
        tell(f"int8, {place}", len(chosen))
        replace_modules(unet, {made: layer for layer, made in taken.items()}.get)

    eligible = set(worth_eight_bits(unet, shapes, LEAST_ROWS["cuda"]).values())
    eight_bits.quantize(unet, eligible, torch.float8_e4m3fn)
    tell("fp8, linear layers", len(eligible))
    swap(unet, found.values())
    tell("fp8, linear layers, and int8, all convolutions", len(eligible) + len(found))
    for name, numbers in eight_bits.FORMATS.items():
        with attention_in(numbers):
            tell(f"both, and {name}, attention", len(eligible) + len(found) + attention)


def swap(unet: Any, chosen: Iterable[torch.nn.Conv2d]) -> dict[Any, eight_bits.ImagewiseConvolution]:
    made = {layer: eight_bits.ImagewiseConvolution(layer, torch.int8) for layer in chosen}
    replace_modules(unet, made.get)
    return made


@contextmanager
def attention_in(numbers: torch.dtype) -> Iterator[None]:
    """Within, attention multiplies rounded numbers."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        q, scale = operators.quantize_rows(x, numbers)
        return q.float() * scale.reshape(*x.shape[:-1], 1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        if numbers == torch.int8:
            k = k - k.mean(-2, keepdim=True)  # which softmax takes no notice of
        else:
            v = rounded(v.mT).mT  # a scale a channel: it is summed over the tokens
        weights = rounded(q) @ rounded(k).mT
        weights = weights.sub_(weights.amax(-1, keepdim=True)).mul_(q.shape[-1] ** -0.5).exp_()
        total = weights.sum(-1, keepdim=True)
        if numbers != torch.int8:
            most = torch.finfo(numbers).max  # the largest weight is 1
            weights = weights.mul_(most).to(numbers).to(v.dtype).div_(most)
        return weights @ v / total

    functions = torch.nn.functional
    before, functions.scaled_dot_product_attention = functions.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        functions.scaled_dot_product_attention = before


def inputs(config: dict[str, Any], side: int) -> dict[str, Any]:
    given: dict[str, Any] = {
        "sample": torch.randn(1, config["in_channels"], side, side),
        "timestep": torch.tensor(999.0),
        "encoder_hidden_states": torch.randn(1, 77, config["cross_attention_dim"]),
        "return_dict": False,
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        sizes = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]])
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(1, pooled), "time_ids": sizes}
    return given


if __name__ == "__main__":
    main()
