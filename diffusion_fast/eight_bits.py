"""Layers that multiply numbers of eight bits. What quantizes and multiplies is in operators.py."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward

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

    def __init__(self, linear: torch.nn.Linear, number_format: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = operators.quantize_rows(linear.weight.detach(), number_format)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale.reshape(1, -1))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) in bf16, fp16 or fp32. Returns (..., out_features) in its dtype."""
        # Not the kernel: in plain PyTorch Inductor makes it one with what comes before, such as a layer norm.
        q, scale = operators.quantized_rows(x.float(), self.weight.dtype)
        return self.multiply(q, scale, x.dtype)

    def multiply(self, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An input that is quantized already: q (..., in_features), scale (rows, 1)."""
        made: torch.Tensor = operators.scaled_matmul(q, self.weight, scale, self.weight_scale, self.bias, dtype)
        return made


class RowwiseGatedLinear(RowwiseLinear):
    """A GatedLinear with such scales: its output is hidden * gelu(gate), half of its out_features."""

    def multiply(self, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An input that is quantized already: q (..., in_features), scale (rows, 1)."""
        made: torch.Tensor = operators.scaled_matmul_geglu(q, self.weight, scale, self.weight_scale, self.bias, dtype)
        return made


class RowwiseFeedForward(torch.nn.Module):
    """A transformer's feed-forward of two RowwiseLinear, GEGLU and the second one's quantization as one kernel.

    Inductor would read GEGLU's input twice: once for the rows' scales, and again to quantize. Where the first one has
    done GEGLU already, quantization is left, and would read twice as well.
    """

    def __init__(self, first: RowwiseLinear, second: RowwiseLinear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., features), as the feed-forward that it stands for."""
        done = isinstance(self.first, RowwiseGatedLinear)
        quantize_rows = operators.quantize_rows if done else operators.geglu_quantize_rows
        q, scale = quantize_rows(self.first(hidden_states), self.second.weight.dtype)
        return self.second.multiply(q, scale, hidden_states.dtype)


class ImagewiseConvolution(torch.nn.Module):
    """A 2D convolution with a scale for each image, found while it runs, and for each output channel of its weights.

    A scale for each pixel can't be taken out of a sum over several.
    """

    weight: torch.Tensor  # (out_channels, in_channels, height, width), channels last
    weight_scale: torch.Tensor  # (out_channels,)
    bias: torch.Tensor | None

    def __init__(self, convolution: torch.nn.Conv2d, number_format: torch.dtype) -> None:
        super().__init__()
        self.number_format = number_format
        self.stride, self.padding = convolution.stride[0], int(convolution.padding[0])
        weight, scale = operators.quantize_filters(convolution.weight.detach(), number_format)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
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

    def convolve(self, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Images that are quantized already: q (images, in_channels, height, width), scale (images,)."""
        given = scale, self.weight_scale, self.bias, None, self.stride, self.padding, dtype
        made: torch.Tensor = operators.convolution_nhwc(q, self.weight, *given)
        return made


def quantize_convolutions(network: Any, number_format: torch.dtype) -> int:
    """Put eight-bit convolutions in the place of all that can be. Returns their number."""

    def make(module: Any) -> Any:
        if isinstance(module, torch.nn.Conv2d) and ImagewiseConvolution.can_be(module):
            return ImagewiseConvolution(module, number_format)
        return None

    return replace_modules(network, make)


def rowwise(linear: torch.nn.Linear, number_format: torch.dtype) -> RowwiseLinear:
    """The eight-bit layer that stands for a linear."""
    return (RowwiseGatedLinear if isinstance(linear, GatedLinear) else RowwiseLinear)(linear, number_format)


def quantize(network: Any, chosen: set[torch.nn.Linear], number_format: torch.dtype) -> int:
    """Put eight-bit layers in the place of `chosen` linears. Returns how many feed-forwards became one kernel fewer."""
    replace_modules(network, lambda module: rowwise(module, number_format) if module in chosen else None)

    def make(module: Any) -> Any:
        layers = _both_layers(module) if isinstance(module, FeedForward) else None
        return RowwiseFeedForward(*layers) if layers else None

    return replace_modules(network, make)


def _both_layers(feed_forward: FeedForward) -> tuple[RowwiseLinear, RowwiseLinear] | None:
    """The layers around GEGLU, where both were quantized and nothing else is there."""
    gate, *others = [layer for layer in feed_forward.net if not isinstance(layer, torch.nn.Dropout)]
    if not isinstance(gate, GEGLU) or len(others) != 1:
        return None
    first, second = gate.proj, others[0]
    return (first, second) if isinstance(first, RowwiseLinear) and isinstance(second, RowwiseLinear) else None
