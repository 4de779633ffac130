"""A pipeline and its networks that know where they are without looking through all of their modules.

diffusers looks for the hooks of offloading and of layerwise casting in every module of a network whenever it asks the
network for its device or dtype (`_get_top_level_group_offload_hook`, `get_parameter_dtype`), which pipelines do several
times a call, before there is any work for the device. Without such hooks the first parameter tells.
https://github.com/huggingface/diffusers/pull/10503
"""

from __future__ import annotations

from typing import Any

HOOKS = ("group_offloading", "layerwise_casting")  # diffusers' names of those that decide about device or dtype
PUTS_THEM = (
    *("enable_group_offload", "enable_layerwise_casting"),
    *("enable_model_cpu_offload", "enable_sequential_cpu_offload"),
)


def spare(pipe: Any) -> int:
    """Have `pipe` and diffusers' networks in it answer from their first parameters. Returns how many networks.

    What would put such hooks in afterwards is refused. ValueError where a network has one already.
    """
    import torch
    from diffusers import ModelMixin

    networks = {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
    for name, network in networks.items():
        if hooked := _hooked(network):
            raise ValueError(f"{name} has hooks of {hooked}, which decide where it computes, or in what")
    spared = [network for network in networks.values() if isinstance(network, ModelMixin)]
    for network in spared:
        members = {"device": property(_device)}
        if not network._keep_in_fp32_modules:  # else its dtype is that of the others
            members["dtype"] = property(_dtype)
        _become(network, members)
    if spared:  # where the pipeline computes is where its largest part is
        largest = max(spared, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))
        where = property(lambda _: _device(largest))
        _become(pipe, {"device": where, "_execution_device": where})
    return len(spared)


def _become(thing: Any, members: dict[str, Any]) -> None:
    """Give one object `members` of its own that only a class can have. The class keeps its name, which is saved."""
    kind = type(thing)
    members |= {name: _refusing(name) for name in PUTS_THEM if hasattr(kind, name)}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    thing.__class__ = type(kind.__name__, (kind,), members)


def _refusing(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"no_module_walks goes by where the networks are, so that {name} can't come after it.")

    return refuse


def _hooked(network: Any) -> str:
    """What kind of hook one of the network's modules has; nothing where there is none."""
    for module in network.modules():
        if getattr(module, "_hf_hook", None) is not None:
            return "accelerate"
        registry = getattr(module, "_diffusers_hook", None)
        for name in HOOKS:
            if registry is not None and registry.get_hook(name) is not None:
                return name
    return ""


def _device(network: Any) -> Any:
    return next(network.parameters()).device


def _dtype(network: Any) -> Any:
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
