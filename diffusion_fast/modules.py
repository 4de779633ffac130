"""Modules of a network: which are its blocks, others in their place, and what their tensors take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def blocks(denoiser: Any, *more: str) -> list[Any]:
    """The blocks that a denoiser repeats, and modules of the classes `more`.

    diffusers says of most models which they repeat; of others it is what their lists of layers hold. A subclass of such
    a class, a block with another forward, is one, too.
    """
    from torch.nn import ModuleList

    lists = [module for module in denoiser.children() if isinstance(module, ModuleList)]
    names = {*(denoiser._repeated_blocks or [type(layer).__name__ for layers in lists for layer in layers]), *more}
    return [module for module in denoiser.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


def outside(network: Any, regions: Iterable[Any]) -> list[Any]:
    """Of a network's modules those that are in none of these."""
    inside = {part for region in regions for part in region.modules()}
    return [module for module in network.modules() if module not in inside]


def place(network: Any, name: str) -> tuple[Any, str]:
    """The owner of the module `name` in a network, and the attribute that it is there."""
    owner, _, attribute = name.rpartition(".")
    return network.get_submodule(owner), attribute


def replace_modules(network: Any, make: Callable[[Any], Any]) -> int:
    """Put what `make` makes of a module in its place, under all of its names. Returns how many were replaced."""
    made: dict[Any, Any] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module not in made:
            made[module] = make(module)
        if made[module] is not None:
            setattr(*place(network, name), made[module])
    return sum(new is not None for new in made.values())


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor as it is stored: a quantized weight is made of others, the numbers and their scales."""
    if hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "tensor_data_names"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())
