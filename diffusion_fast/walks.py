"""Networks that know where they are, without a look through all of their modules.

Whenever diffusers asks a network for its device, it first looks for a hook of group offloading in each of its modules
(`_get_group_onload_device`), and pipelines ask several times a call, before there is any work for the device. Networks
without such hooks answer from their first parameter. https://github.com/huggingface/diffusers/pull/10503
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

# diffusers' methods that put in hooks which decide where a network computes.
OFFLOADING = ("enable_group_offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload")

_known: weakref.WeakSet[Any] = weakref.WeakSet()


def spare(pipe: Any, name: str) -> int:
    """Have the networks of `pipe` answer from their first parameters. Returns how many.

    Methods of theirs that would put such hooks in afterwards are refused, in the `name` of what has spared them.
    ValueError where there is one already.
    """
    import torch
    from diffusers.hooks import group_offloading

    networks = {each: network for each, network in pipe.components.items() if isinstance(network, torch.nn.Module)}
    for each, network in networks.items():
        if _is_hooked(network):
            raise ValueError(f"{each} has hooks that move it to where it computes")
    for thing in (pipe, *networks.values()):
        for method in OFFLOADING:
            if hasattr(thing, method):
                setattr(thing, method, functools.partial(_refuse, name, method))
    original = group_offloading._get_group_onload_device
    if not hasattr(original, "__wrapped__"):
        group_offloading._get_group_onload_device = functools.wraps(original)(functools.partial(_device, original))
    _known.update(networks.values())
    return len(networks)


def _device(original: Any, network: Any) -> Any:
    """Where `network` computes, if it is known to be where its parameters are; else what `original` says."""
    return next(network.parameters()).device if network in _known else original(network)


def _refuse(name: str, method: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"{name} goes by where the networks are: {method} can't come after it.")


def _is_hooked(network: Any) -> bool:
    """Whether one of the network's modules has a hook of accelerate's, or of diffusers' group offloading."""
    for module in network.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if getattr(module, "_hf_hook", None) or (registry is not None and registry.get_hook("group_offloading")):
            return True
    return False
