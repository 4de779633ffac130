"""Every optimization: one decorated function each, with what it requires, excludes and needs declared beside it.

A function changes the pipeline in the making (`Build`) and returns an account of the state that it left, which it has
checked itself: it raises where the effect isn't there. The stage, not the order of typing, decides what comes first.
Imports of torch sit inside the functions, because the parent process plans recipes without it.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from diffusion_fast.inductor import parallel_coordinate_descent
from diffusion_fast.spec import DTYPES, Model, RunSpec

STAGES = ("load", "attention", "layout", "fuse", "swap", "quantize", "inductor", "compile")


@dataclass
class Build:
    """A pipeline in the making. Up to the stage `load` there is no `pipe`; from then on there is."""

    model: Model
    spec: RunSpec
    dtype: str = "float32"
    fp16_vae: bool = False
    compile_options: dict[str, Any] = field(default_factory=dict)
    pipe: Any = None
    proofs: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)  # called after the warm-up

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.model.denoiser)

    def networks(self) -> Iterator[tuple[str, Any]]:
        """The pipeline's neural networks by their names in it."""
        import torch

        for name, component in self.pipe.components.items():
            if isinstance(component, torch.nn.Module):
                yield name, component


@dataclass(frozen=True)
class Optimization:
    """A registered optimization. `requires` holds groups of alternatives: one of each group must be in the recipe."""

    name: str
    apply: Callable[[Build], dict[str, Any]]
    stage: str
    requires: tuple[tuple[str, ...], ...] = ()
    excludes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda", "cpu")
    min_capability: tuple[int, int] = (0, 0)
    model_needs: str = ""  # a field of Model that must not be empty
    requires_where: tuple[str, str] = (
        "",
        "",
    )  # a field of Model and a name: where the one is set, the other is required
    imports: tuple[str, ...] = ()  # slow modules it needs, imported (and timed) before the pipeline loads
    lossless: bool = True  # False: changes the image by more than rounding

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.apply) or "").partition("\n")[0]


OPTIMIZATIONS: dict[str, Optimization] = {}


def optimization(
    *, stage: str, requires: tuple[str | tuple[str, ...], ...] = (), **declared: Any
) -> Callable[[Callable[[Build], dict[str, Any]]], Callable[[Build], dict[str, Any]]]:
    """Register a function under its own name. `requires` takes names, and tuples of names that will do as well."""
    groups = tuple((item,) if isinstance(item, str) else item for item in requires)

    def register(function: Callable[[Build], dict[str, Any]]) -> Callable[[Build], dict[str, Any]]:
        if stage not in STAGES:
            raise ValueError(f"there is no stage {stage!r}")
        name = function.__name__
        OPTIMIZATIONS[name] = Optimization(name, function, stage, groups, **declared)
        return function

    return register


# --- load: numbers and weights ---------------------------------------------------------------------------------------


@optimization(stage="load", devices=("cuda",))
def tf32(build: Build) -> dict[str, Any]:
    """Let fp32 matmuls and cuDNN convolutions round their inputs to TF32's 10 bits of mantissa.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    import torch

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return {"matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.allow_tf32}


@optimization(stage="load", excludes=("fp16",))
def bf16(build: Build) -> dict[str, Any]:
    """Run every network in bfloat16: fp32's range, 8 bits of mantissa, half the bytes."""
    return _set_dtype(build, "bf16")


@optimization(stage="load", excludes=("bf16",), devices=("cuda",), requires_where=("fp16_vae_hub_id", "vae_fp16_fix"))
def fp16(build: Build) -> dict[str, Any]:
    """Run every network in float16: 11 bits of mantissa, half the bytes, overflows past 65504.

    Where a model's own VAE overflows, the one that doesn't is required.
    """
    return _set_dtype(build, "fp16")


def _set_dtype(build: Build, name: str) -> dict[str, Any]:
    import torch

    build.dtype = DTYPES[name]

    def proof() -> dict[str, Any]:
        wanted = getattr(torch, build.dtype)
        for component, network in build.networks():
            other = {p.dtype for p in network.parameters() if p.is_floating_point() and p.dtype != wanted}
            if other:
                raise RuntimeError(f"{name}: {component} still has parameters in {other}")
        return {"dtype": build.dtype}

    build.proofs[name] = proof
    return {}


@optimization(stage="load", model_needs="fp16_vae_hub_id")
def vae_fp16_fix(build: Build) -> dict[str, Any]:
    """Take the VAE that was fine-tuned to stay finite in float16, so that it needn't be upcast to fp32.

    https://huggingface.co/madebyollin/sdxl-vae-fp16-fix
    """
    build.fp16_vae = True

    def proof() -> dict[str, Any]:
        if build.pipe.vae.config.force_upcast:
            raise RuntimeError("vae_fp16_fix: the VAE in the pipeline still asks to be upcast")
        return {"vae": "random" if build.spec.weights == "random" else build.model.fp16_vae_hub_id}

    build.proofs["vae_fp16_fix"] = proof
    return {}


# --- attention, layout, fused projections, swapped modules -----------------------------------------------------------


@optimization(stage="attention")
def sdpa(build: Build) -> dict[str, Any]:
    """Compute attention by scaled_dot_product_attention: fused kernels that never write the score matrix out.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    changed = 0
    for name, network in build.networks():
        if hasattr(network, "set_attn_processor"):
            network.set_attn_processor(AttnProcessor2_0())
            kinds = {type(processor) for processor in network.attn_processors.values()}
            if kinds != {AttnProcessor2_0}:
                raise RuntimeError(f"sdpa: {name} still attends by {sorted(kind.__name__ for kind in kinds)}")
            changed += len(network.attn_processors)
        elif hasattr(network, "set_attn_implementation"):
            network.set_attn_implementation("sdpa")
            if network.config._attn_implementation != "sdpa":
                raise RuntimeError(f"sdpa: {name} still attends by {network.config._attn_implementation}")
            changed += network.config.num_hidden_layers
    return {"attention_layers": changed}


@optimization(stage="layout")
def channels_last(build: Build) -> dict[str, Any]:
    """Store images channel by channel at each pixel (NHWC), the layout that cuDNN's tensor-core convolutions read.

    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    import torch

    changed = already = 0
    for network in (build.denoiser, build.pipe.vae):
        before = {p.data_ptr() for p in network.parameters() if p.ndim == 4 and _is_channels_last(p)}
        network.to(memory_format=torch.channels_last)
        for parameter in network.parameters():
            if parameter.ndim == 4:
                if not _is_channels_last(parameter):
                    raise RuntimeError(f"channels_last: a {tuple(parameter.shape)} weight kept its layout")
                already += parameter.data_ptr() in before
                changed += parameter.data_ptr() not in before
    return {"convolutions_changed": changed, "already": already}


def _is_channels_last(tensor: Any) -> bool:
    import torch

    return bool(tensor.is_contiguous(memory_format=torch.channels_last))


@optimization(stage="fuse", requires=("sdpa",))
def fused_qkv(build: Build) -> dict[str, Any]:
    """Compute query, key and value by one matmul (key and value in cross-attention); the separate weights are freed.

    https://huggingface.co/docs/diffusers/tutorials/fast_diffusion#combining-the-attention-blocks-projection-matrices
    """
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    build.pipe.fuse_qkv_projections()
    fused = freed = 0
    for network in (build.denoiser, build.pipe.vae):
        for module in network.modules():
            if not isinstance(module, Attention):
                continue
            if not (module.fused_projections and isinstance(module.processor, FusedAttnProcessor2_0)):
                raise RuntimeError("fused_qkv: an attention layer was left unfused")
            # diffusers keeps the separate layers beside the fused one, and quantizing would then quantize both.
            for name in ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v"):
                freed += sum(parameter.numel() for parameter in getattr(module, name).parameters())
                delattr(module, name)
            fused += 1
    return {"attention_layers": fused, "freed_parameters": freed}


@optimization(stage="swap", imports=("torchao.quantization",))
def conv_as_linear(build: Build) -> dict[str, Any]:
    """Turn 1x1 convolutions with 128 input or output channels into linear layers, as diffusion-fast does.

    In SDXL that is no convolution of the UNet and two of the VAE.
    """
    import torch
    from torchao.quantization.quant_api import swap_conv2d_1x1_to_linear

    def small_1x1(module: torch.nn.Module, *_: Any) -> bool:
        return (
            isinstance(module, torch.nn.Conv2d)
            and module.kernel_size == (1, 1)
            and 128 in (module.in_channels, module.out_channels)
        )

    swapped = 0
    for network in (build.denoiser, build.pipe.vae):
        swapped += sum(map(small_1x1, network.modules()))
        swap_conv2d_1x1_to_linear(network, small_1x1)
        if any(map(small_1x1, network.modules())):
            raise RuntimeError("conv_as_linear: a 1x1 convolution was left")
    return {"convolutions": swapped}


# --- quantize --------------------------------------------------------------------------------------------------------


@optimization(
    stage="quantize",
    requires=(("bf16", "fp16"), ("compile", "regional_compile")),
    min_capability=(8, 0),
    imports=("torchao.quantization",),
    lossless=False,
)
def int8_dynamic(build: Build) -> dict[str, Any]:
    """Multiply in int8: weights scaled per channel beforehand, activations per row while it runs.

    A model may list the shapes to leave alone (SDXL has diffusion-fast's list); elsewhere every linear layer is taken
    whose sizes an int8 matmul accepts. https://github.com/pytorch/ao/tree/main/torchao/quantization
    """
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    start = time.perf_counter()
    rows = _rows_per_linear(build)
    calibration_s = time.perf_counter() - start
    excluded = set(build.model.int8_excluded_shapes)

    def takes_int8(module: torch.nn.Module, *_: Any) -> bool:
        if not isinstance(module, torch.nn.Linear) or rows.get(module, 0) <= 16:
            return False  # _int_mm needs more than 16 rows: embeddings of the time step have two
        if module.in_features <= 16 or module.in_features % 8 or module.out_features % 8:
            return False
        return (module.in_features, module.out_features) not in excluded

    # Left to itself the config sets inductor flags for the whole process: here they belong to inductor_tuning.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantized = linears = 0
    for network in (build.denoiser, build.pipe.vae):
        chosen = [module for module in network.modules() if takes_int8(module)]
        linears += sum(isinstance(module, torch.nn.Linear) for module in network.modules())
        quantize_(network, config, filter_fn=takes_int8)
        if any(type(module.weight.data) is torch.Tensor for module in chosen):
            raise RuntimeError("int8_dynamic: a chosen layer kept its plain weight")
        quantized += len(chosen)
    if not quantized:
        raise RuntimeError("int8_dynamic: no layer of this model can be multiplied in int8")
    return {"quantized_linears": quantized, "linears": linears, "calibration_s": calibration_s}


def _rows_per_linear(build: Build) -> dict[Any, int]:
    """How many rows each linear layer of the denoiser and the VAE multiplies, seen in one eager step."""
    import torch

    rows: dict[Any, int] = {}

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows[module] = inputs[0].numel() // inputs[0].shape[-1]

    hooks = [
        module.register_forward_pre_hook(note)
        for network in (build.denoiser, build.pipe.vae)
        for module in network.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    spec = build.spec
    build.pipe(
        spec.prompt,
        num_inference_steps=1,
        guidance_scale=spec.guidance_scale,
        height=spec.height,
        width=spec.width,
        num_images_per_prompt=spec.batch_size,
    )
    for hook in hooks:
        hook.remove()
    return rows


# --- compile ---------------------------------------------------------------------------------------------------------


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
        return {"graphs": graphs, "graph_breaks": breaks} | ({"compiled_ahead": asdict(ahead)} if ahead else {})

    build.proofs[name] = proof
    return {"mode": build.spec.compile_mode, "options": options}


def compiles(names: Iterable[str]) -> bool:
    """Whether a recipe of these names compiles anything."""
    return any(OPTIMIZATIONS[name].stage == "compile" for name in names)
