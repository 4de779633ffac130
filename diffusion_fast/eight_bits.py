"""Layers that multiply numbers of eight bits. What quantizes and multiplies is in operators.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward

from diffusion_fast import operators
from diffusion_fast.gated import GatedLinear
from diffusion_fast.modules import replace_modules

if torch.version.cuda is not None:
    import diffusion_fast.kernels  # noqa: F401 - CUDA tensors go to them from here on

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


class RowwiseLinear(torch.nn.Module):
    """A linear layer with a scale for each row of its input, found while it runs, and for each row of its weights.

    Its numbers are buffers, not parameters: there is nothing to train, and a network's dtype stays what it was.
    """

    weight: torch.Tensor  # (out_features, in_features)
    weight_scale: torch.Tensor  # (1, out_features)
    bias: torch.Tensor | None

    def __init__(
        self, linear: torch.nn.Linear, number_format: torch.dtype, divided: torch.Tensor | None = None
    ) -> None:
        """`divided` (in_features,): what the input is divided by before it comes here."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        weight, scale = operators.quantize_rows(weight if divided is None else weight * divided, number_format)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale.reshape(1, -1))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) in bf16, fp16 or fp32. Returns (..., out_features) in its dtype."""
        # Not the kernel: in plain PyTorch Inductor makes it one with what comes before, such as a layer norm.
        q, scale = operators.quantized_rows(x.float(), self.weight.dtype)
        return self.multiply(q, scale, x.dtype)

    def multiply(self, q: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """An input that is quantized already: q (..., in_features), scale (rows, 1) or None."""
        made: torch.Tensor = operators.scaled_matmul(q, self.weight, scale, self.weight_scale, self.bias, dtype)
        return made


class RowwiseGatedLinear(RowwiseLinear):
    """A GatedLinear with such scales: its output is hidden * gelu(gate), half of its out_features.

    Where `limits` says how large these can become, the output is in eight bits and needs no scale: each column is
    divided by what makes its limit fit.
    """

    def __init__(self, linear: torch.nn.Linear, number_format: torch.dtype, limits: torch.Tensor | None = None) -> None:
        """`limits` (out_features / 2,), see `gated_limits`."""
        super().__init__(linear, number_format)
        self.out_dtype = None if limits is None else number_format
        if limits is not None:
            # Hidden is linear in these, and gate stays what it is.
            shrunk = operators.in_turns(torch.cat([1 / room_for(limits, number_format), torch.ones_like(limits)]))
            self.weight_scale *= shrunk
            if self.bias is not None:
                self.bias = self.bias * shrunk

    def multiply(self, q: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """An input that is quantized already: q (..., in_features), scale (rows, 1) or None."""
        given = q, self.weight, scale, self.weight_scale, self.bias
        made: torch.Tensor = operators.scaled_matmul_geglu(*given, self.out_dtype or dtype)
        return made


class RowwiseFeedForward(torch.nn.Module):
    """A transformer's feed-forward of two RowwiseLinear, GEGLU and the second one's quantization as one kernel.

    Inductor would read GEGLU's input twice: once for the rows' scales, and again to quantize. Where the first one has
    done GEGLU already, quantization is left, and would read twice as well; nothing is where it has done that, too.
    """

    ones: torch.Tensor  # (MOST_ROWS, 1)

    def __init__(self, first: RowwiseLinear, second: RowwiseLinear, ones: torch.Tensor) -> None:
        """`ones` are the scales of rows that need none: filling them would be a launch in each step."""
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("ones", ones, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., features), as the feed-forward that it stands for."""
        made, dtype = self.first(hidden_states), self.second.weight.dtype
        if made.dtype == dtype:
            rows = made.numel() // made.shape[-1]
            ones = self.ones[:rows] if rows <= len(self.ones) else None
            return self.second.multiply(made, ones, hidden_states.dtype)
        done = isinstance(self.first, RowwiseGatedLinear)
        q, scale = (operators.quantize_rows if done else operators.geglu_quantize_rows)(made, dtype)
        return self.second.multiply(q, scale, hidden_states.dtype)


class ImagewiseConvolution(torch.nn.Module):
    """A 2D convolution with a scale for each image, found while it runs, and for each output channel of its weights.

    A scale for each pixel can't be taken out of a sum over several. A shift of the whole image can: it adds to each
    result what the weights sum up to.
    """

    weight: torch.Tensor  # (out_channels, in_channels, height, width), channels last
    weight_scale: torch.Tensor  # (out_channels,)
    weight_sums: torch.Tensor | None  # (out_channels, height, width), over in_channels; of int8, for what shifts
    bias: torch.Tensor | None

    def __init__(self, convolution: torch.nn.Conv2d, number_format: torch.dtype) -> None:
        super().__init__()
        self.number_format = number_format
        self.stride, self.padding = convolution.stride[0], int(convolution.padding[0])
        weight, scale = operators.quantize_filters(convolution.weight.detach(), number_format)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        # Of the rounded weights: their errors then cancel where an image is far from the middle of its range, which is
        # nearly everywhere.
        sums = None if number_format.is_floating_point else (weight.float() * scale[:, None, None, None]).sum(1)
        self.register_buffer("weight_sums", sums)
        self.register_buffer("bias", None if convolution.bias is None else convolution.bias.detach())

    @classmethod
    def can_be(cls, convolution: torch.nn.Conv2d) -> bool:
        """Whether the kernel takes it. A network's ends have too few channels; they also matter most."""
        multiple = 16 if convolution.stride == (1, 1) else 64
        return (
            convolution.in_channels % multiple == convolution.out_channels % 16 == 0
            and convolution.groups == 1
            and convolution.dilation == (1, 1)
            and convolution.padding_mode == "zeros"
            and convolution.stride in ((1, 1), (2, 2))
            and convolution.padding in ((0, 0), (1, 1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (images, in_channels, height, width). Returns (images, out_channels, ...) in its dtype, channels last."""
        q, scale = operators.quantize_image(x, self.number_format)
        return self.convolve(q, scale, x.dtype)

    def convolve(
        self, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images that are quantized already: q (images, in_channels, height, width), scale and shift (images,)."""
        sums = None if shift is None else self.weight_sums
        given = scale, self.weight_scale, self.bias, None, self.stride, self.padding, dtype, shift, sums
        made: torch.Tensor = operators.convolution_nhwc(q, self.weight, *given)
        return made


def quantizable_convolutions(network: Any) -> dict[str, torch.nn.Conv2d]:
    """By their names, the convolutions that are worth it to be ImagewiseConvolution where they make enough pixels.

    Those of single pixels never are: residual blocks' shortcuts, a thirtieth of the work and half of what all lose
    (squared, docs/experiments.md), for no norm comes before them, which besides could quantize for them.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1) and ImagewiseConvolution.can_be(module)
    }


def quantize_convolutions(network: Any, chosen: Iterable[torch.nn.Conv2d], number_format: torch.dtype) -> None:
    """Put eight-bit convolutions in the place of `chosen` ones."""
    places = {convolution: ImagewiseConvolution(convolution, number_format) for convolution in chosen}
    replace_modules(network, places.get)


def rowwise(linear: torch.nn.Linear, number_format: torch.dtype) -> RowwiseLinear:
    """The eight-bit layer that stands for a linear."""
    return (RowwiseGatedLinear if isinstance(linear, GatedLinear) else RowwiseLinear)(linear, number_format)


MOST_ROWS = 2**15  # of SDXL at batch 4
SLACK = 1.3  # both factors of both products are quantized, and may grow by a sixteenth each: 1.274


def room_for(limits: torch.Tensor, number_format: torch.dtype) -> torch.Tensor:
    """What numbers with such limits have to be divided by to fit into the format."""
    return (SLACK * limits / operators.largest(number_format)).clamp(min=operators.SMALLEST_SCALE)


def gated_limits(norm: torch.nn.LayerNorm, linear: GatedLinear) -> torch.Tensor:
    """How large each number of hidden * gelu(gate) can become behind a layer norm, whatever is normalized.

    A normalized row of n numbers is no longer than sqrt(n), so that no product with it is larger than sqrt(n) times the
    length of the other factor (Cauchy–Schwarz); and |gelu(x)| <= |x|. Returns (out_features / 2,) in fp32. Numbers come
    nowhere near, but fp8 is as precise for those that are smaller, down to the 20,000th part of the limit.
    """
    weight = linear.weight.detach().float()
    shift = torch.zeros(len(weight), device=weight.device) if linear.bias is None else linear.bias.detach().float()
    if norm.bias is not None:
        shift = shift + weight @ norm.bias.detach().float()
    if norm.weight is not None:
        weight = weight * norm.weight.detach().float()
    reach = math.sqrt(linear.in_features) * weight.norm(dim=1) + shift.abs()
    hidden, gate = reach.unflatten(0, (-1, 2, operators.TOGETHER)).unbind(1)
    return torch.flatten(hidden * gate)


def quantize(network: Any, chosen: set[torch.nn.Linear], number_format: torch.dtype) -> dict[str, int]:
    """Put eight-bit layers in the place of `chosen` linears. Returns how many feed-forwards became fewer kernels.

    In fp8, behind a layer norm, these quantize where they multiply (`gated_limits`): its numbers keep their precision
    over 15 powers of two. In int8 each row needs the scale that fits it.
    """
    made: dict[Any, RowwiseLinear] = {}
    for block in network.modules() if number_format.is_floating_point else ():
        layers = _both_layers(block.ff) if _norm_before(block) else None
        if layers and chosen.issuperset(layers) and isinstance(layers[0], GatedLinear):
            limits = gated_limits(block.norm3, layers[0])
            made[layers[0]] = RowwiseGatedLinear(layers[0], number_format, limits)
            made[layers[1]] = RowwiseLinear(layers[1], number_format, room_for(limits, number_format))
    made |= {linear: rowwise(linear, number_format) for linear in chosen if linear not in made}
    replace_modules(network, made.get)

    ones = torch.ones((MOST_ROWS, 1), device=next(iter(chosen)).weight.device)

    def fuse(module: Any) -> Any:
        layers = _both_layers(module) if isinstance(module, FeedForward) else None
        return (
            RowwiseFeedForward(*layers, ones)
            if layers and all(isinstance(each, RowwiseLinear) for each in layers)
            else None
        )

    fused = replace_modules(network, fuse)
    limited = sum(isinstance(layer, RowwiseGatedLinear) and layer.out_dtype is not None for layer in made.values())
    return {"fused_feed_forwards": fused, "limited_feed_forwards": limited}


def _norm_before(block: Any) -> bool:
    """Whether what a block's feed-forward is given is a plain layer norm's."""
    return (
        isinstance(block, BasicTransformerBlock)
        and block.norm_type == "layer_norm"
        and isinstance(block.norm3, torch.nn.LayerNorm)
    )


def _both_layers(feed_forward: FeedForward) -> tuple[Any, Any] | None:
    """The layers around GEGLU, where nothing else is there."""
    gate, *others = [layer for layer in feed_forward.net if not isinstance(layer, torch.nn.Dropout)]
    if not isinstance(gate, GEGLU) or len(others) != 1:
        return None
    return gate.proj, others[0]
