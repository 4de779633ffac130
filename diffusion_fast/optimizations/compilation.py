"""Stages inductor and compile: graphs instead of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from diffusion_fast.inductor import parallel_coordinate_descent
from diffusion_fast.optimizations.registry import Build, optimization


@optimization(stage="inductor", requires=(("compile", "regional_compile"),))
def inductor_tuning(build: Build) -> dict[str, Any]:
    """Compile 1x1 convolutions as matmuls, search tile sizes in all directions, keep matmuls' epilogues apart.

    With int8 layers, also fuse the scaling into the int8 matmul. The flags hold for the compiled modules alone.
    """
    flags = {
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }
    if "int8_dynamic" in build.spec.optimizations:
        flags["force_fuse_int_mm_with_mul"] = True
    build.compile_options |= flags
    return dict(flags)


COMPILERS = ("torch._dynamo", "torch._inductor.compile_fx")


@optimization(stage="compile", excludes=("regional_compile",), imports=COMPILERS)
def compile(build: Build) -> dict[str, Any]:  # noqa: A001 - it is called what the field calls it
    """Compile the denoiser and the VAE's decoder by torch.compile, each as one graph.

    The mode is the run's: max-autotune on a GPU, default on a CPU, unless asked otherwise.
    """
    # Compiling the VAE itself would miss `vae.decode`; its decoder is where the work is.
    modules = {build.model.denoiser: build.denoiser, "vae.decoder": build.pipe.vae.decoder}
    return _compile(build, "compile", modules.values(), least=len(modules)) | {"modules": list(modules)}


@optimization(stage="compile", excludes=("compile",), imports=COMPILERS)
def regional_compile(build: Build) -> dict[str, Any]:
    """Compile the denoiser's repeated blocks, each shape of them once, and the VAE's decoder as one graph.

    Tens of blocks share a few graphs, so that there is far less to compile than in the whole denoiser. What lies
    between them stays eager. https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
    """
    import torch

    # Each shape of a block is a graph of the same code, and SDXL's residual blocks have more than dynamo's limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    regions = _regions(build.denoiser)
    counts = Counter(type(region).__name__ for region in regions)
    modules = [*regions, build.pipe.vae.decoder]
    # A second shape is compiled for itself, not for all shapes: that would be slower ever after.
    return _compile(build, "regional_compile", modules, least=len(counts) + 1, dynamic=False) | {
        "regions": dict(counts)
    }


MOST_SHAPES = 64


def _regions(denoiser: Any) -> list[Any]:
    """The blocks that a denoiser repeats, by diffusers' own account, and its residual blocks."""
    blocks = {*(denoiser._repeated_blocks or ()), "ResnetBlock2D"}
    found = [module for module in denoiser.modules() if type(module).__name__ in blocks]
    if not found:
        raise RuntimeError(f"regional_compile: {type(denoiser).__name__} has none of the blocks {sorted(blocks)}")
    return found


def _compile(
    build: Build, name: str, modules: Iterable[Any], least: int, dynamic: bool | None = None
) -> dict[str, Any]:
    """Have modules compiled at their first call, each as one graph, and prove afterwards that `least` graphs were."""
    import torch
    from torch._dynamo.utils import counters

    # `mode` and `options` exclude each other, and only `options` can carry the flags without setting them globally.
    options = torch._inductor.list_mode_options(build.spec.compile_mode) | build.compile_options
    # Which kernels are chosen is the flags' business; that the search for them uses every core is everybody's.
    searched = build.spec.device == "cuda" and options.get("coordinate_descent_tuning")
    ahead = parallel_coordinate_descent() if searched else None
    for module in modules:
        module.compile(fullgraph=True, dynamic=dynamic, options=options)

    def proof() -> dict[str, Any]:
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        if graphs < least or breaks:
            raise RuntimeError(f"{name}: {graphs} graphs, of at least {least}, and {breaks} graph breaks")
        cached = counters["inductor"]["fxgraph_cache_hit"]
        return {"graphs": graphs, "from_cache": cached, "graph_breaks": breaks} | (
            {"compiled_ahead": asdict(ahead)} if ahead else {}
        )

    build.proofs[name] = proof
    return {"mode": build.spec.compile_mode, "options": options}
