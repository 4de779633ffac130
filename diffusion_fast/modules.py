"""Modules of a network in the place of others, and what their tensors take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
