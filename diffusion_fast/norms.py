"""Layers that normalize images by group norm. What computes it is in operators.py."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D

from diffusion_fast import operators
from diffusion_fast.eight_bits import ImagewiseConvolution

if torch.version.cuda is not None:
    import diffusion_fast.norm_kernels  # noqa: F401 - CUDA tensors go to them from here on


class ImageGroupNorm(torch.nn.Module):
    """Group norm of images, and of what is added to them beforehand, with the SiLU behind it where there is one.

    The parameters are those of the torch.nn.GroupNorm that it stands for, under their names. `x_bias` is the bias of
    the convolution before it, which then has none: there it would be a pass of its own. Wu and He 2018,
    https://arxiv.org/abs/1803.08494
    """

    x_bias: torch.Tensor | None  # (channels,)

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool = False, x_bias: torch.nn.Parameter | None = None) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = norm.weight, norm.bias
        self.register_parameter("x_bias", x_bias)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}, silu={self.silu}"

    def forward(self, x: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """x: (images, channels, height, width); embedding: (images, channels), added to x. Returns x's shape, NHWC."""
        given = self.groups, self.weight, self.bias, self.eps, self.silu, self.x_bias, embedding
        made: torch.Tensor = operators.group_norm_nhwc(x, *given)
        return made

    def convolved(self, convolution: Any, x: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """What a convolution makes of the norm's result, which for one in eight bits is written in them at once."""
        if not isinstance(convolution, ImagewiseConvolution):
            made: torch.Tensor = convolution(self(x, embedding))
            return made
        given = self.groups, self.weight, self.bias, self.eps, self.silu, convolution.number_format
        q, scale, shift = operators.group_norm_quantize_nhwc(x, *given, self.x_bias, embedding)
        shifted = operators.is_shifted(self.silu, convolution.number_format)  # else a product more would add nothing
        return convolution.convolve(q, scale, x.dtype, shift if shifted else None)


class NormedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]  # diffusers has no types
    """A residual block whose two norms are ImageGroupNorm with SiLU; the second adds what the block does before it.

    diffusers' forward, where nothing lies between norm and activation (`plain`). An existing block becomes one by
    `become`: the same object, with its layers and their names.
    """

    @staticmethod
    def plain(block: torch.nn.Module) -> bool:
        """Whether the block activates what it has just normalized, by SiLU, and neither drops nor samples."""
        return (
            type(block) is ResnetBlock2D
            and block.time_embedding_norm != "scale_shift"  # which lies between the second norm and its activation
            and isinstance(block.nonlinearity, torch.nn.SiLU)
            and block.upsample is block.downsample is None
            and block.dropout.p == 0
            and can_be_replaced(block.norm1)
            and can_be_replaced(block.norm2)
        )

    @classmethod
    def become(cls, block: Any) -> None:
        x_bias: Any = None
        if type(block.conv1) is torch.nn.Conv2d:  # else something wraps it that may count on its bias
            x_bias, block.conv1.bias = block.conv1.bias, None
        block.norm1 = ImageGroupNorm(block.norm1, silu=True)
        block.norm2 = ImageGroupNorm(block.norm2, silu=True, x_bias=x_bias)
        block.__class__ = cls

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """input_tensor: (images, channels, height, width); temb: the time embedding (images, features), or None."""
        hidden_states = self.norm1.convolved(self.conv1, input_tensor)
        embedding = None
        if self.time_emb_proj is not None:
            embedding = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        elif temb is not None and self.time_embedding_norm == "default":
            hidden_states = hidden_states + temb
        hidden_states = self.norm2.convolved(self.conv2, hidden_states, embedding)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        made: torch.Tensor = (input_tensor + hidden_states) / self.output_scale_factor
        return made


def can_be_replaced(norm: Any) -> bool:
    return type(norm) is torch.nn.GroupNorm and norm.weight is not None


def replace_group_norms(network: Any) -> dict[str, int]:
    """Put ImageGroupNorm in the place of each group norm that is known to be given images. Returns their numbers.

    SiLU becomes part of it where it provably follows: in residual blocks, and behind a network's last norm. The group
    norm of the VAE's attention stays: it normalizes tokens, channels first.
    """
    norms = with_silu = 0
    for module in list(network.modules()):
        if NormedResnetBlock2D.plain(module):
            NormedResnetBlock2D.become(module)
            norms, with_silu = norms + 2, with_silu + 2
            continue
        names: tuple[str, ...] = ()
        if isinstance(module, ResnetBlock2D):
            names = ("norm1", "norm2")
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            names = ("norm",)
        elif isinstance(getattr(module, "conv_act", None), torch.nn.SiLU) and can_be_replaced(module.conv_norm_out):
            module.conv_norm_out = ImageGroupNorm(module.conv_norm_out, silu=True)
            module.conv_act = torch.nn.Identity()
            norms, with_silu = norms + 1, with_silu + 1
        for name in names:
            if can_be_replaced(getattr(module, name)):
                setattr(module, name, ImageGroupNorm(getattr(module, name)))
                norms += 1
    return {"group_norms": norms, "with_silu": with_silu}
