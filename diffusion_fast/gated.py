"""The first half of a feed-forward, linear and GEGLU, as one operation. What computes it is in operators.py."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU

from diffusion_fast import operators
from diffusion_fast.modules import replace_modules

if torch.version.cuda is not None:
    import diffusion_fast.kernels  # noqa: F401 - CUDA tensors go to them from here on


class GatedLinear(torch.nn.Linear):
    """A linear layer whose output is hidden and gate: it returns hidden * gelu(gate), half of its out_features.

    The rows of its weight and bias are in turns (operators.in_turns).
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = _frozen(operators.in_turns(linear.weight.detach()))
        if linear.bias is not None:
            self.bias = _frozen(operators.in_turns(linear.bias.detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) in the weight's dtype, bf16 or fp16. Returns (..., out_features / 2)."""
        made: torch.Tensor = operators.linear_geglu(x, self.weight, self.bias)
        return made


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' GEGLU with its linear, which does all there is to do. Its name, `proj`, stays what it was."""

    def __init__(self, geglu: GEGLU) -> None:
        torch.nn.Module.__init__(self)
        self.proj = GatedLinear(geglu.proj)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., features), as the module that it stands for."""
        made: torch.Tensor = self.proj(hidden_states)
        return made


def fuse(network: Any) -> int:
    """Put one operation in the place of each GEGLU with its linear. Returns their number.

    A GEGLU by another GELU than the exact one is another class, and stays. ValueError where the kernel doesn't take the
    sizes.
    """
    return replace_modules(network, lambda module: FusedGEGLU(_checked(module)) if type(module) is GEGLU else None)


def _checked(geglu: GEGLU) -> GEGLU:
    features, columns = geglu.proj.in_features, geglu.proj.out_features
    if features % 8 or columns % 16:
        raise ValueError(f"a GEGLU of {features} to {columns // 2} features: both have to be multiples of 8")
    return geglu


def _frozen(rows: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(rows, requires_grad=False)
