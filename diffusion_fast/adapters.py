"""What of a network's adapters a computation that was made beforehand depends on, and when it has to be made anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

METHODS = (
    *("load_lora_adapter", "add_adapter", "delete_adapters", "unload_lora", "fuse_lora", "unfuse_lora"),
    *("load_adapter", "delete_adapter", "set_adapter", "set_adapters"),
    *("enable_adapters", "disable_adapters", "enable_lora", "disable_lora"),
    *("resize_token_embeddings", "set_input_embeddings"),  # by which words are added to a text encoder, and taken away
)


def when_changed(network: Any, forget: Callable[[], None]) -> None:
    """Call `forget` before each of the network's methods that attach, change or take away an adapter."""
    for method in METHODS:
        if hasattr(network, method):
            setattr(network, method, _forgetting(getattr(network, method), forget))


def _forgetting(method: Callable[..., Any], forget: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        forget()
        return method(*args, **kwargs)

    return call


def strengths(network: Any) -> Hashable:
    """Which adapters of a network are applied, and how strongly. Empty without any.

    Arguments of a call may change that, and pipelines do by way of the layers, past the network's methods.
    """
    if not getattr(network, "_hf_peft_config_loaded", False):
        return ()
    return tuple(
        (tuple(module.scaling.items()), tuple(module.active_adapters), module.disable_adapters)
        for module in network.modules()
        if hasattr(module, "scaling")
    )
