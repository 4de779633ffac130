"""Layers of a denoiser that are given the same as others: what they make of it is computed at one place, for all.

Of the prompt that is once a call (PromptProjections), of the time step once a step (TimeProjections).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from diffusion_fast import graphs
from diffusion_fast.modules import replace_modules

MOST = graphs.MOST  # shapes of prompts, or of times; each keeps what all layers make of one


class Projection(torch.nn.Module):
    """A layer that projects the prompt or the time step, and what it made of the current one.

    That is a buffer, because torch.compile makes an input of the graph of it: all blocks of a shape still share one.
    """

    made: torch.Tensor | None  # (batch, ..., out_features); None: the layer computes each time that it is called

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("made", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, ..., in_features), a prompt (batch, tokens, in_features). Returns (batch, ..., out_features)."""
        if self.made is not None:
            return self.made
        computed: torch.Tensor = self.layer(x)
        return computed


class Projections:
    """Projections in the place of `layers`, which return what is computed for all of them at one place.

    For each shape of what they are given there are buffers that stay where they are, for a CUDA graph reads them there
    whenever that shape comes again; past MOST shapes the layers compute each time.
    """

    def __init__(self, denoiser: Any, layers: Iterable[torch.nn.Module]) -> None:
        places = {layer: Projection(layer) for layer in layers}
        replace_modules(denoiser, places.get)
        self.projections = list(places.values())
        self.kept: dict[Any, list[torch.Tensor]] = {}  # by shape, and never dropped: a captured graph may read them
        self.current: Any = None  # the shape whose buffers the projections have

    def buffers(self, given: torch.Tensor, make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Those for such a tensor, which each projection now returns its own of; none past MOST shapes.

        `make` gives new ones, not yet filled: one for each projection, and behind them what else is of that shape.
        """
        key = given.shape, given.dtype, given.device
        if key not in self.kept and len(self.kept) < MOST:
            with torch.inference_mode(False), torch.no_grad():  # else they could only be filled in inference mode
                self.kept[key] = make()
        found = self.kept.get(key, [])
        if key != self.current:
            for number, projection in enumerate(self.projections):
                projection.made = found[number] if found else None
            self.current = key
        return found


class PromptProjections(Projections):
    """Filled before a step of the denoiser whose prompt is not the last step's.

    The same prompt is the same tensor with the same version, which grows when it is changed in place (but not when it
    is changed by way of `.data`).
    """

    def __init__(self, denoiser: Any, layers: Iterable[torch.nn.Module], position: int) -> None:
        """`position` of the prompt, `encoder_hidden_states`, among the denoiser's arguments."""
        super().__init__(denoiser, layers)
        self.position = position
        self.prompt: torch.Tensor | None = None  # held, so that no other tensor can come to be at its address
        self.version: int | None = None
        self.projected = self.steps = 0
        # Not in `forward`, which is what is captured: whether a prompt is a new one is for the host to decide.
        denoiser.register_forward_pre_hook(self.before_step, with_kwargs=True)

    def before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the denoiser's calls."""
        prompt = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[self.position]
        version = None if prompt.is_inference() else prompt._version  # inference mode counts no versions
        self.steps += 1
        if prompt is self.prompt and version is not None and version == self.version:
            return
        self.prompt = None  # whatever may go wrong now
        if self.buffers(prompt, lambda: [torch.empty_like(each.layer(prompt)) for each in self.projections]):
            self.project(prompt)
            self.projected += 1
        self.prompt, self.version = prompt, version

    def project(self, prompt: torch.Tensor) -> None:
        """Fill the buffers. prompt: (batch, tokens, features), of the shape that they are for."""
        with torch.no_grad():
            for projection in self.projections:
                assert projection.made is not None
                projection.made.copy_(projection.layer(prompt))


class TimeProjections(Projections):
    """All filled by one product before each step, for the residual blocks.

    Their weights become parts of one matrix, so that nothing is there twice, and their buffers parts of its product.
    """

    def __init__(self, denoiser: Any, layers: Iterable[torch.nn.Linear], activation: torch.nn.Module) -> None:
        """`layers` are given what `activation` makes of the time embedding, (batch, features) each."""
        super().__init__(denoiser, layers)
        self.activation = activation
        self.sizes: list[Any] = [projection.layer.out_features for projection in self.projections]
        self.join()
        self.steps = 0
        denoiser.down_blocks[0].register_forward_pre_hook(self.before_blocks, with_kwargs=True)

    def join(self) -> None:
        """Make one matrix of the layers' weights, and one vector of their biases, which become parts of these."""
        layers: list[Any] = [projection.layer for projection in self.projections]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])  # (sum of sizes, features)
        self.bias = torch.cat([_bias(layer) for layer in layers])
        for layer, weight, bias in zip(layers, self.weight.split(self.sizes), self.bias.split(self.sizes), strict=True):
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                layer.bias = torch.nn.Parameter(bias, requires_grad=False)

    def before_blocks(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the first block, which is given the time embedding as all others are."""
        time = kwargs["temb"] if "temb" in kwargs else args[1]
        first: Any = self.projections[0].layer
        if first.weight.data_ptr() != self.weight.data_ptr():  # moved to another device
            self.join()

        def unfilled() -> list[torch.Tensor]:
            product = torch.empty((len(time), len(self.weight)), dtype=time.dtype, device=time.device)
            return [*product.split(self.sizes, dim=1), product]

        if buffers := self.buffers(time, unfilled):
            with torch.no_grad():
                torch.addmm(self.bias, self.activation(time), self.weight.t(), out=buffers[-1])
            self.steps += 1


def _bias(layer: torch.nn.Linear) -> torch.Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
