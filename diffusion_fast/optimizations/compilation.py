"""Stages inductor and compile: graphs instead of calls."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from diffusion_fast import adapters, graphs
from diffusion_fast.ahead import AheadOfTime, cache_folder
from diffusion_fast.graphs import Graphed
from diffusion_fast.inductor import parallel_coordinate_descent
from diffusion_fast.modules import blocks, outside
from diffusion_fast.optimizations.registry import Build, optimization
from diffusion_fast.spec import RunSpec


def _tuning(spec: RunSpec) -> dict[str, bool]:
    flags = {
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }
    return flags | ({"force_fuse_int_mm_with_mul": True} if "int8_dynamic" in spec.optimizations else {})


@optimization(
    stage="inductor",
    requires=(("compile", "regional_compile"),),
    code=lambda spec: "\n".join(f"compile_options[{name!r}] = {flag}" for name, flag in _tuning(spec).items()),
)
def inductor_tuning(build: Build) -> dict[str, Any]:
    """Compile 1x1 convolutions as matmuls, search tile sizes in all directions, keep matmuls' epilogues apart.

    With int8 layers, also fuse the scaling into the int8 matmul. The flags hold for the compiled modules alone.
    diffusion-fast's, https://pytorch.org/blog/accelerating-generative-ai-3/
    """
    flags = _tuning(build.spec)
    build.compile_options |= flags
    return flags


@optimization(stage="inductor", requires=(("compile", "regional_compile"),), devices=("cuda",))
def persistent_reductions(build: Build) -> dict[str, Any]:
    """Keep a row in registers while it is normalized, also one of more than 1,024 numbers, which Inductor reads twice.

    Such are the layer norms of SDXL's widest blocks, and their quantization. In Inductor's terms a reduction is
    persistent where its whole row is one block; this moves the limit, by its own hook for such choices.
    https://github.com/pytorch/pytorch/blob/main/torch/_inductor/choices.py
    """
    from diffusion_fast.inductor import keep_rows

    return {"longest_row": keep_rows()}


COMPILERS = ("torch._dynamo", "torch._inductor.compile_fx")
OPTIONS = """import torch._inductor
options = torch._inductor.list_mode_options("$compile_mode") | compile_options"""


SDPA_WHERE = ("written_out", ("sdpa",))  # what writes attention out can't be traced


@optimization(
    stage="compile",
    excludes=("regional_compile", "ahead_of_time"),
    imports=COMPILERS,
    requires_where=SDPA_WHERE,
    code=f"""{OPTIONS}
for network in (denoiser, pipe.vae.decoder):
    network.compile(fullgraph=True, options=options)
""",
)
def compile(build: Build) -> dict[str, Any]:  # noqa: A001 - it is called what the field calls it
    """Compile the denoiser and the VAE's decoder by torch.compile, each as one graph.

    The mode is the run's: max-autotune on a GPU, default on a CPU, unless asked otherwise.
    Ansel et al. 2024, https://doi.org/10.1145/3620665.3640366
    """
    # Compiling the VAE itself would miss `vae.decode`; its decoder is where the work is.
    modules = _whole_networks(build)
    return _compile(build, "compile", modules.values(), least=len(modules)) | {"modules": list(modules)}


def _whole_networks(build: Build) -> dict[str, Any]:
    """What is worth compiling, each as one graph, by its name in the pipeline."""
    return {build.model.denoiser: build.denoiser, "vae.decoder": build.pipe.vae.decoder}


MOST_GRAPHS = 32 * graphs.MOST  # SDXL has some 20 for each size and batch
BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")  # beside those that diffusers says a model repeats


@optimization(
    stage="compile",
    excludes=("compile", "ahead_of_time"),
    imports=COMPILERS,
    requires_where=SDPA_WHERE,
    code=f"""{OPTIONS}
import functools
import torch._dynamo
for limit in ("recompile_limit", "accumulated_recompile_limit"):
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), {MOST_GRAPHS}))
lists = [module for module in denoiser.children() if isinstance(module, torch.nn.ModuleList)]
repeated = denoiser._repeated_blocks or [type(layer).__name__ for layers in lists for layer in layers]
blocks = {{*repeated, *{BLOCKS!r}}}
regions = [module for module in denoiser.modules() if blocks & {{kind.__name__ for kind in type(module).__mro__}}]
for region in (*regions, pipe.vae.decoder):
    region.compile(fullgraph=True, dynamic=False, options=options)


def normalize(norm, image):
    return type(norm).forward(norm, image)


inside = {{part for region in regions for part in region.modules()}}
for module in denoiser.modules():  # a module of torch's own is compiled by its function alone
    if isinstance(module, torch.nn.GroupNorm) and module not in inside:
        function = functools.partial(normalize, module)
        module.forward = torch.compile(function, fullgraph=True, dynamic=False, options=options)
""",
)
def regional_compile(build: Build) -> dict[str, Any]:
    """Compile the denoiser's repeated blocks, each shape of them once, and the VAE's decoder as one graph.

    Tens of blocks share a few graphs, so that there is far less to compile than in the whole denoiser. Covered are the
    transformer and residual blocks, the sampling convolutions and the norms between them. What else lies there, linears
    and sums, stays eager. https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
    """
    import torch

    # Every shape of every block is a graph of the same code to dynamo, that of a module's call, and its limit is 8.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), MOST_GRAPHS))
    regions = _regions(build.denoiser)
    counts = Counter(type(region).__name__ for region in regions)
    norms = [module for module in outside(build.denoiser, regions) if isinstance(module, torch.nn.GroupNorm)]
    # A second shape is compiled for itself, not for all shapes: that would be slower ever after.
    account = _compile(
        build,
        "regional_compile",
        [*regions, build.pipe.vae.decoder],
        functions=[(norm, "forward", functools.partial(_norm, norm)) for norm in norms],
        least=len(counts) + 1 + bool(norms),
        dynamic=False,
    )
    return account | {"regions": dict(counts) | ({"GroupNorm": len(norms)} if norms else {})}


# No package holds a CUDA graph: the modes that capture one are left to torch.compile.
@optimization(
    stage="compile",
    excludes=("compile", "regional_compile"),
    imports=("torch._inductor.package",),
    modes=("default", "max-autotune-no-cudagraphs"),
    requires_where=SDPA_WHERE,
    takes_adapters=False,
)
def ahead_of_time(build: Build) -> dict[str, Any]:
    """Compile the denoiser and the VAE's decoder ahead of time: a later process loads them without tracing anything.

    Each is a package in the compile cache, for each shape of its inputs. The weights stay the pipeline's own.
    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    import torch

    options = torch._inductor.list_mode_options(build.spec.compile_mode) | build.compile_options
    networks = _whole_networks(build)
    made = [
        AheadOfTime(name, network, cache_folder(), options, made_by=build.spec.optimizations)
        for name, network in networks.items()
    ]
    for each, network in zip(made, networks.values(), strict=True):
        network.forward = each

    def proof() -> dict[str, Any]:
        if idle := [each.name for each in made if not each.packages]:
            raise RuntimeError(f"ahead_of_time: nothing was compiled or loaded of {', '.join(idle)}")
        accounts = [each.account() for each in made]
        return {name: sum(account[name] for account in accounts) for name in accounts[0]}

    build.proofs["ahead_of_time"] = proof
    return {"mode": build.spec.compile_mode, "options": options, "modules": list(networks)}


EIGHT_BITS = ("RowwiseLinear", "ImagewiseConvolution")


def _regions(denoiser: Any) -> list[Any]:
    """A denoiser's repeated blocks, its residual blocks and sampling layers, and what eight-bit layers lie between."""
    found = blocks(denoiser, *BLOCKS)
    # An eight-bit layer is several kernels unless it is compiled.
    found += [module for module in outside(denoiser, found) if type(module).__name__ in EIGHT_BITS]
    if not found:
        raise RuntimeError(
            f"regional_compile: {type(denoiser).__name__} has none of the blocks that are known to repeat"
        )
    return found


def _norm(norm: Any, image: Any) -> Any:
    """A module of torch's own can't be compiled by itself: dynamo skips the frames of torch's files."""
    return type(norm).forward(norm, image)


def _compile(
    build: Build,
    name: str,
    modules: Iterable[Any],
    least: int,
    functions: Iterable[tuple[Any, str, Callable[..., Any]]] = (),
    dynamic: bool | None = None,
) -> dict[str, Any]:
    """Have modules compiled at their first call, each as one graph, and prove afterwards that `least` graphs were.

    `functions` are compiled likewise, and become attributes: (owner, attribute, function).
    """
    import torch
    from torch._dynamo.utils import counters

    # `mode` and `options` exclude each other, and only `options` can carry the flags without setting them globally.
    options = torch._inductor.list_mode_options(build.spec.compile_mode) | build.compile_options
    # Which kernels are chosen is the flags' business; that the search for them uses every core is everybody's.
    searched = build.spec.device == "cuda" and options.get("coordinate_descent_tuning")
    ahead = parallel_coordinate_descent() if searched else None
    for module in modules:
        module.compile(fullgraph=True, dynamic=dynamic, options=options)
    for owner, attribute, function in functions:
        setattr(owner, attribute, torch.compile(function, fullgraph=True, dynamic=dynamic, options=options))

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


# --- capture ---------------------------------------------------------------------------------------------------------


@optimization(stage="capture", devices=("cuda",), modes=("default", "max-autotune-no-cudagraphs"))
def cuda_graph(build: Build) -> dict[str, Any]:
    """Launch the text encoders, the denoiser's work in a step and the VAE's decoder as one CUDA graph each.

    Thousands of launches a step become one, so that a slow host no longer holds the GPU up. Calls in other shapes are
    captured when they come; an adapter that is attached or changed has everything captured anew.
    https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/
    """
    captured = []
    networks = dict(build.networks())
    for name, owner, attribute in build.launched():
        network = networks.get(name.partition(" ")[0].partition(".")[0])
        state = functools.partial(adapters.strengths, network)
        graphed = Graphed(name, getattr(owner, attribute), build.pipe.device, state=state)
        setattr(owner, attribute, graphed)
        captured.append(graphed)
    for _, network in build.networks():
        adapters.when_changed(network, functools.partial(graphs.forget, captured))

    def proof() -> dict[str, Any]:
        idle = [graphed.name for graphed in captured if not graphed.replays]
        if idle and (build.spec.steps > 1 or not build.step_calls):  # one step is of one kind
            raise RuntimeError(f"cuda_graph: nothing was replayed of {', '.join(idle)}")
        return {graphed.name: graphed.account() for graphed in captured}

    build.proofs["cuda_graph"] = proof
    return {}
