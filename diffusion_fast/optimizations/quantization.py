"""Stage quantize: fewer bits a number."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

from diffusion_fast.modules import blocks, outside, stored_bytes
from diffusion_fast.optimizations.registry import Build, eight_bit_formats, optimization
from diffusion_fast.spec import RunSpec

MIB = 2**20
Shapes = tuple[tuple[int, int], ...]  # of linear layers: features of the input, of the output


# What says how the denoiser's linear layers are stored: one of them at a time.
LINEAR_FORMATS = (
    *("int8_dynamic", "fp8_dynamic", "fp8_dynamic_tensor", "fp8_rows", "int8_rows"),
    *("int8_weight_only", "fp8_weight_only", "int4_weight_only", "layerwise_casting"),
)


def _others(name: str) -> tuple[str, ...]:
    return tuple(each for each in LINEAR_FORMATS if each != name)


# FLOPs for each byte that a layer reads and writes in 16 bits. A GPU computes some 150 (A100) to 300 (H100) of them
# while it moves a byte: below that a layer waits for its memory, and quantizing its input is more to move.
LEAST_INTENSITY = {"cuda": 200, "cpu": 8}


def _weights_code(spec: RunSpec, multiple: int, config: str, group: int = 1, least: int = 17) -> str:
    """`_by_torchao` in plain Python, for layers of which only the weights are quantized."""
    return f"""
{config}
from torchao.quantization import quantize_


def suited(linear, *_):
    if not isinstance(linear, torch.nn.Linear) or linear.weight.dtype != dtype or linear.in_features < {least}:
        return False
    return linear.in_features % {max(multiple, group)} == linear.out_features % {multiple} == 0


for network in (denoiser, pipe.vae):
    quantize_(network, config, filter_fn=suited)
"""


def _multiply_code(
    spec: RunSpec, multiple: int, config: str, excluded: Shapes | str = (), by_intensity: bool | str = True
) -> str:
    """`_multiply_by_torchao` in plain Python. `config` is lines that make torchao's own."""
    return f"""
{config}
from torchao.quantization import quantize_

rows = {{}}  # of each linear layer, seen in an eager step


def note(module, inputs):
    rows[module] = inputs[0].numel() // inputs[0].shape[-1]


networks = denoiser, pipe.vae
linears = [each for network in networks for each in network.modules() if isinstance(each, torch.nn.Linear)]
hooks = [linear.register_forward_pre_hook(note) for linear in linears]
pipe(**arguments | {{"num_inference_steps": $least_steps}})
for hook in hooks:
    hook.remove()
excluded = set({excluded})


def suited(linear):
    shape = linear.in_features, linear.out_features
    if linear.weight.dtype != dtype or shape[0] < 17 or shape[0] % {multiple} or shape[1] % {multiple}:
        return False
    return rows.get(linear, 0) > 16 and shape not in excluded


def intensity(linear):  # FLOPs for each byte that it reads and writes in 16 bits
    count, features, outputs = rows[linear], linear.in_features, linear.out_features
    return 2 * count * features * outputs / (2 * (count * features + features * outputs + count * outputs))


by_intensity = {by_intensity}
able = {{linear for linear in linears if suited(linear)}}
gaining = {{linear for linear in able if not by_intensity or intensity(linear) >= {LEAST_INTENSITY[spec.device]}}}
chosen = gaining or able  # in a model too small to gain, all that can be
for network in networks:
    quantize_(network, config, filter_fn=lambda module, _: module in chosen)
"""


@optimization(
    stage="quantize",
    requires=(("bf16", "fp16"), ("compile", "regional_compile")),
    excludes=_others("int8_dynamic"),
    min_capability=(8, 0),
    imports=("torchao.quantization",),
    lossless=False,
    takes_adapters=False,
    code=functools.partial(
        _multiply_code,
        multiple=8,
        config="""
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)""",
        excluded="$int8_excluded_shapes",
        by_intensity="not excluded",
    ),
    calls_pipeline=True,
)
def int8_dynamic(build: Build) -> dict[str, Any]:
    """Multiply in int8: weights scaled per channel beforehand, activations per row while it runs.

    A model may list the shapes to leave alone (SDXL has diffusion-fast's list); elsewhere every linear layer is taken
    that has more to compute than to read. https://github.com/pytorch/ao/tree/main/torchao/quantization
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    # Left to itself the config sets inductor flags for the whole process: here they belong to inductor_tuning.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    listed = build.model.int8_excluded_shapes
    return _multiply_by_torchao(build, config, "Int8Tensor", multiple=8, excluded=listed, by_intensity=not listed)


# torchao takes one scale for such a layer for one of the blocks of 128×128 that another of its formats has.
ONE_BLOCK = (128, 128)
# Of the largest number that a scale is for. The prompt that SDXL guides away from is all zeros, and torchao divides a
# row of them by its scale.
LEAST_LARGEST = 1e-6


# torchao has scales a row for bf16 alone.
@optimization(
    stage="quantize",
    requires=("bf16", ("compile", "regional_compile")),
    excludes=("fused_geglu", *_others("fp8_dynamic")),
    devices=("cuda",),
    min_capability=(8, 9),
    imports=("torchao.quantization",),
    lossless=False,
    takes_adapters=False,
    code=functools.partial(
        _multiply_code,
        multiple=16,
        config=f"""
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
config = Float8DynamicActivationFloat8WeightConfig(
    granularity=PerRow(), activation_value_lb={LEAST_LARGEST}, set_inductor_config=False
)""",
    ),
    calls_pipeline=True,
)
def fp8_dynamic(build: Build) -> dict[str, Any]:
    """Multiply in fp8 (e4m3) by torchao: a scale a row of the weights beforehand, of the activations while it runs.

    The rows of fp8_rows, by PyTorch's own matmul and what Inductor makes of the rest.
    https://arxiv.org/abs/2209.05433, https://docs.pytorch.org/ao/stable/workflows/inference.html
    """
    from torchao.quantization import PerRow

    return _fp8_by_torchao(build, PerRow())


@optimization(
    stage="quantize",
    requires=("bf16", ("compile", "regional_compile")),
    excludes=("fused_geglu", *_others("fp8_dynamic_tensor")),
    devices=("cuda",),
    min_capability=(8, 9),
    imports=("torchao.quantization",),
    lossless=False,
    takes_adapters=False,
    code=functools.partial(
        _multiply_code,
        multiple=16,
        config=f"""
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor
config = Float8DynamicActivationFloat8WeightConfig(
    granularity=PerTensor(), activation_value_lb={LEAST_LARGEST}, set_inductor_config=False
)""",
        excluded=(ONE_BLOCK,),
    ),
    calls_pipeline=True,
)
def fp8_dynamic_tensor(build: Build) -> dict[str, Any]:
    """Multiply in fp8 (e4m3) by torchao: one scale for all of a layer's weights, and one for all of its activations.

    Less to compute than a scale a row, and an outlier costs all rows their precision. https://arxiv.org/abs/2209.05433
    """
    from torchao.quantization import PerTensor

    return _fp8_by_torchao(build, PerTensor(), excluded=(ONE_BLOCK,))


def _fp8_by_torchao(build: Build, granularity: Any, excluded: Shapes = ()) -> dict[str, Any]:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=granularity, activation_value_lb=LEAST_LARGEST, set_inductor_config=False
    )
    return _multiply_by_torchao(build, config, "Float8Tensor", multiple=16, excluded=excluded)


@optimization(
    stage="quantize",
    requires=(("bf16", "fp16"),),
    excludes=("fused_geglu", "ahead_of_time", *_others("int8_weight_only")),
    min_capability=(8, 0),
    imports=("torchao.quantization",),
    lossless=False,
    takes_adapters=False,
    code=functools.partial(
        _weights_code,
        multiple=8,
        config="""
from torchao.quantization import Int8WeightOnlyConfig
config = Int8WeightOnlyConfig(set_inductor_config=False)""",
    ),
)
def int8_weight_only(build: Build) -> dict[str, Any]:
    """Store linear layers in int8, a scale a channel, and multiply in 16 bits: half the memory, and no faster.

    https://docs.pytorch.org/ao/stable/workflows/inference.html
    """
    from torchao.quantization import Int8WeightOnlyConfig

    return _by_torchao(build, Int8WeightOnlyConfig(set_inductor_config=False), "Int8Tensor", _suited(build, multiple=8))


# Inductor's kernels convert fp8 from this capability on.
@optimization(
    stage="quantize",
    requires=(("bf16", "fp16"),),
    excludes=("fused_geglu", "ahead_of_time", *_others("fp8_weight_only")),
    min_capability=(8, 9),
    imports=("torchao.quantization",),
    lossless=False,
    takes_adapters=False,
    code=functools.partial(
        _weights_code,
        multiple=16,
        config="""
from torchao.quantization import Float8WeightOnlyConfig
config = Float8WeightOnlyConfig(set_inductor_config=False)""",
    ),
)
def fp8_weight_only(build: Build) -> dict[str, Any]:
    """Store linear layers in fp8 (e4m3), a scale a channel, and multiply in 16 bits: half the memory, and no faster.

    https://docs.pytorch.org/ao/stable/workflows/inference.html
    """
    from torchao.quantization import Float8WeightOnlyConfig

    config = Float8WeightOnlyConfig(set_inductor_config=False)
    return _by_torchao(build, config, "Float8Tensor", _suited(build, multiple=16))


INT4_GROUP = 64  # numbers with one scale: divides the widths of SD, SDXL and PixArt
INT4_TENSORS = {"cuda": "Int4TilePackedTo4dTensor", "cpu": "Int4OpaqueTensor"}
# Features are padded to multiples of 1,024 on a GPU: with fewer than these the padding takes more than 16 bits would.
INT4_LEAST = {"cuda": 320, "cpu": 64}


def _int4_code(spec: RunSpec) -> str:
    config = {
        "cuda": f"""
from torchao.quantization import Int4WeightOnlyConfig
from torchao.quantization.quantize_.workflows import Int4PackingFormat
packing = Int4PackingFormat.TILE_PACKED_TO_4D
config = Int4WeightOnlyConfig(int4_packing_format=packing, group_size={INT4_GROUP}, set_inductor_config=False)""",
        "cpu": f"""
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
config = PrototypeInt4WeightOnlyConfig(group_size={INT4_GROUP}, set_inductor_config=False)""",
    }[spec.device]
    return _weights_code(spec, multiple=16, config=config, group=INT4_GROUP, least=INT4_LEAST[spec.device])


@optimization(
    stage="quantize",
    requires=("bf16",),  # which is all that the kernel for CUDA takes
    excludes=("fused_geglu", "ahead_of_time", *_others("int4_weight_only")),
    min_capability=(8, 0),
    imports=("torchao.quantization",),
    lossless=False,
    takes_adapters=False,
    code=_int4_code,
)
def int4_weight_only(build: Build) -> dict[str, Any]:
    """Store linear layers in 4 bits, a scale and a zero for 64 numbers, and multiply in bf16 by PyTorch's tinygemm.

    Of torchao's formats for it this is the one whose kernels come with PyTorch. They are made for few rows: on a GPU
    this saves memory and costs time.
    https://docs.pytorch.org/ao/stable/workflows/inference.html
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    chosen: dict[str, Any] = {"group_size": INT4_GROUP, "set_inductor_config": False}
    config = (
        Int4WeightOnlyConfig(int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D, **chosen)
        if build.spec.device == "cuda"
        else PrototypeInt4WeightOnlyConfig(**chosen)
    )
    device = build.spec.device
    suited = _suited(build, multiple=16, group=INT4_GROUP, least=INT4_LEAST[device])
    return _by_torchao(build, config, INT4_TENSORS[device], suited)


# Its hooks make parameters anew in each call, which no graph can hold.
@optimization(
    stage="quantize",
    requires=(("bf16", "fp16"),),
    excludes=(
        "fused_geglu",
        "compile",
        "regional_compile",
        "ahead_of_time",
        "cuda_graph",
        *_others("layerwise_casting"),
    ),
    lossless=False,
    takes_adapters=False,
    code="denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)",
)
def layerwise_casting(build: Build) -> dict[str, Any]:
    """Store the denoiser's linears and convolutions in fp8 without a scale, and cast each to 16 bits while it computes.

    Half the memory of the denoiser, and a copy of each weight more in every step. Norms stay, and what a model's
    authors name. https://huggingface.co/docs/diffusers/optimization/memory
    """
    import torch
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    dtype, before = getattr(torch, build.dtype), sum(map(stored_bytes, build.denoiser.parameters()))
    build.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    build.own_dtypes.add(build.model.denoiser)

    def account() -> dict[str, Any]:
        cast = [
            module
            for module in build.denoiser.modules()
            if any(
                isinstance(hook, LayerwiseCastingHook)
                for hook in HookRegistry.check_if_exists_or_initialize(module).hooks.values()
            )
        ]
        stored = {parameter for module in cast for parameter in module.parameters()}
        if not stored or any(parameter.dtype != torch.float8_e4m3fn for parameter in stored):
            raise RuntimeError("layerwise_casting: the denoiser's layers aren't stored in fp8")
        if any(each.dtype != dtype for each in build.denoiser.parameters() if each not in stored):
            raise RuntimeError(f"layerwise_casting: a layer that isn't cast isn't in {build.dtype}")
        after = sum(map(stored_bytes, build.denoiser.parameters()))
        return {"cast_layers": len(cast), "weight_mib": after / MIB, "weight_mib_before": before / MIB}

    build.proofs["layerwise_casting"] = account  # once more: that layers are cast back behind a call
    return account()


def _suited(
    build: Build,
    multiple: int,
    group: int = 1,
    least: int = 17,
    rows: dict[Any, int] | None = None,
    excluded: Shapes = (),
    by_intensity: bool = True,
) -> set[Any]:
    """The linear layers of the denoiser and the VAE that torchao is given, whatever the format.

    Both features have to be multiples of `multiple`, those of the input, at least `least`, of `group`, too. Where
    activations are quantized as well (`rows` of each layer in a step), its shape mustn't be `excluded`, and there has
    to be enough to compute: more than _int_mm's 16 rows, which the embeddings of the time step haven't, and, unless a
    model lists its shapes, the arithmetic intensity. A part that was left in another number format stays as it is.
    """
    import torch

    dtype = getattr(torch, build.dtype)

    def worth_it(linear: Any) -> bool:
        if rows is None:
            return True
        count, shape = rows.get(linear, 0), (linear.in_features, linear.out_features)
        if count <= 16 or shape in excluded:
            return False
        return not by_intensity or _intensity(count, *shape) >= LEAST_INTENSITY[build.spec.device]

    return {
        module
        for network in (build.denoiser, build.pipe.vae)
        for module in network.modules()
        if isinstance(module, torch.nn.Linear)
        and module.weight.dtype == dtype
        and module.in_features >= least
        and module.in_features % max(multiple, group) == module.out_features % multiple == 0
        and worth_it(module)
    }


def _intensity(rows: int, features: int, outputs: int) -> float:
    """FLOPs a byte of a matmul in 16 bits. Williams et al. 2009, https://doi.org/10.1145/1498765.1498785"""
    return 2 * rows * features * outputs / (2 * (rows * features + features * outputs + rows * outputs))


def _multiply_by_torchao(
    build: Build, config: Any, kind: str, multiple: int, excluded: Shapes, by_intensity: bool = True
) -> dict[str, Any]:
    """Quantize weights, and have activations quantized, where that is worth it.

    In a small model, such as the bundled one on a GPU, it is worth it nowhere: there all are taken that can be.
    """
    start = time.perf_counter()
    rows = {layer: _rows(shape) for layer, shape in _inputs_of_linears(build).items()}
    calibration_s = time.perf_counter() - start
    suited = functools.partial(_suited, build, multiple, rows=rows, excluded=excluded)
    chosen = suited(by_intensity=by_intensity) or suited(by_intensity=False)
    account = _by_torchao(build, config, kind, chosen)
    if any(module.weight.act_quant_kwargs is None for module in chosen):
        raise RuntimeError(f"{type(config).__name__}: a chosen layer doesn't quantize its input")
    return account | {"calibration_s": calibration_s}


def _by_torchao(build: Build, config: Any, kind: str, chosen: set[Any]) -> dict[str, Any]:
    """Give `chosen` layers to torchao. Raises RuntimeError where a weight doesn't become a smaller tensor, a `kind`."""
    import torch
    from torchao.quantization import quantize_

    if not chosen:
        raise RuntimeError(f"{type(config).__name__}: no layer of this model has the sizes")
    networks = build.denoiser, build.pipe.vae
    before = {module: stored_bytes(module.weight) for module in chosen}
    for network in networks:
        quantize_(network, config, filter_fn=lambda module, _: module in chosen)
    for module in chosen:
        found, size = type(module.weight.data).__name__, stored_bytes(module.weight)
        if found != kind or size >= before[module]:
            raise RuntimeError(
                f"{type(config).__name__}: a weight of {before[module]} bytes became a {found} of {size}, not a {kind}"
            )
    linears = sum(isinstance(module, torch.nn.Linear) for network in networks for module in network.modules())
    return {
        "quantized_linears": len(chosen),
        "linears": linears,
        "tensor": kind,
        "weight_mib": sum(stored_bytes(module.weight) for module in chosen) / MIB,
        "weight_mib_before": sum(before.values()) / MIB,
    }


LEAST_ROWS = {"cuda": 256, "cpu": 17}
# Attention's kernel doesn't quantize what it writes, so that the layer behind it has to, in a kernel of its own. On an
# H100 that took 3.7 µs for SDXL's 2048 rows of 1280, and eight bits gave back 2.0 (docs/experiments.md). That
# grows with both sides of a layer, quantizing with one of them; from where on it pays was not measured.
LEAST_FEATURES_BEHIND_ATTENTION = 2048
# For SD 1.5's 512 pixels our kernel takes 0.9 to 1.04 of cuDNN's time in int8, for its 128 1.2 to 1.8 (an H200,
# docs/experiments.md). On a CPU, which has no such kernel, small models are tested in place of large ones.
LEAST_PIXELS = {"cuda": 512, "cpu": 1}


@optimization(
    stage="quantize",
    requires=("bf16", ("compile", "regional_compile", "ahead_of_time")),
    excludes=_others("fp8_rows"),
    min_capability=(8, 9),
    imports=("diffusion_fast.eight_bits",),
    lossless=False,
    takes_adapters=False,
    number_format="fp8",
    calls_pipeline=True,
)
def fp8_rows(build: Build) -> dict[str, Any]:
    """Multiply the denoiser's linears in fp8 (e4m3): a scale a row, GEGLU and quantization as one kernel.

    Micikevicius et al. 2022, FP8 formats for deep learning, https://arxiv.org/abs/2209.05433; scales a row as in
    LLM.int8(), https://arxiv.org/abs/2208.07339
    """
    return _eight_bits(build)


@optimization(
    stage="quantize",
    requires=("bf16", ("compile", "regional_compile", "ahead_of_time")),
    excludes=_others("int8_rows"),
    min_capability=(9, 0),
    imports=("diffusion_fast.eight_bits",),
    lossless=False,
    takes_adapters=False,
    number_format="int8",
    calls_pipeline=True,
)
def int8_rows(build: Build) -> dict[str, Any]:
    """Multiply the denoiser's linears in int8: a scale a row, GEGLU and quantization as one kernel.

    The scales of int8_dynamic, by kernels of our own. https://arxiv.org/abs/2208.07339
    """
    return _eight_bits(build)


@optimization(
    stage="quantize",
    requires=("bf16", "channels_last", ("compile", "regional_compile", "ahead_of_time")),
    min_capability=(9, 0),
    imports=("diffusion_fast.eight_bits",),
    model_needs="unet",
    lossless=False,
    takes_adapters=False,
    image_format="fp8",
    calls_pipeline=True,
)
def fp8_convolutions(build: Build) -> dict[str, Any]:
    """Convolve the denoiser's images in fp8 (e4m3): a scale an image, and one for each output channel of the weights.

    By a kernel of our own: an implicit matrix product, https://arxiv.org/abs/1410.0759
    """
    return _eight_bit_convolutions(build, "fp8")


@optimization(
    stage="quantize",
    requires=("bf16", "channels_last", ("compile", "regional_compile", "ahead_of_time")),
    excludes=("fp8_convolutions",),
    min_capability=(9, 0),
    imports=("diffusion_fast.eight_bits",),
    model_needs="unet",
    lossless=False,
    takes_adapters=False,
    image_format="int8",
    calls_pipeline=True,
)
def int8_convolutions(build: Build) -> dict[str, Any]:
    """Convolve the denoiser's images in int8: a scale an image, and one for each output channel of the weights.

    By the kernel of fp8_convolutions. Within one scale int8 has the finer steps, but for numbers that are small beside
    the largest. https://arxiv.org/abs/1410.0759
    """
    return _eight_bit_convolutions(build, "int8")


def _eight_bit_convolutions(build: Build, number_format: str) -> dict[str, Any]:
    """Quantize every convolution of the denoiser that is worth it, but for those that the run keeps."""
    import torch

    from diffusion_fast import eight_bits

    name = f"{number_format}_convolutions"
    halvings = sum(type(module).__name__ == "Downsample2D" for module in build.denoiser.modules())
    smallest = 2**halvings * build.pipe.vae_scale_factor
    if build.spec.height % smallest or build.spec.width % smallest:
        raise RuntimeError(f"{name}: height and width have to be multiples of {smallest} pixels here")
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in build.denoiser.modules())
    start = time.perf_counter()
    _, candidates = eligible_convolutions(build, name)
    calibration_s = time.perf_counter() - start
    chosen = _not_kept(build, name, candidates)
    eight_bits.quantize_convolutions(build.denoiser, chosen, eight_bits.FORMATS[number_format])
    return {
        "quantized_convolutions": len(chosen),
        "convolutions": convolutions,
        "kept": len(candidates) - len(chosen),
        "calibration_s": calibration_s,
    }


def _not_kept(build: Build, name: str, candidates: dict[str, Any]) -> list[Any]:
    """Of layers by their names those that the run doesn't keep. RuntimeError where it keeps all or what isn't there."""
    if unknown := set(build.spec.kept) - {each for each, _ in build.denoiser.named_modules()}:
        raise RuntimeError(f"{name}: the denoiser has no layer {min(unknown)}, which was to be kept")
    chosen = [module for each, module in candidates.items() if each not in build.spec.kept]
    if not chosen:
        raise RuntimeError(f"{name}: all of its {len(candidates)} layers are kept in 16 bits")
    return chosen


def _eight_bits(build: Build) -> dict[str, Any]:
    """Quantize every linear of the denoiser that is worth it, but for those that the run keeps."""
    import torch

    from diffusion_fast import eight_bits

    name, _ = eight_bit_formats(build.spec.optimizations)
    start = time.perf_counter()
    _, candidates = eligible(build, f"{name}_rows")
    calibration_s = time.perf_counter() - start
    linears = sum(isinstance(module, torch.nn.Linear) for module in build.denoiser.modules())
    chosen = set(_not_kept(build, f"{name}_rows", candidates))
    fused = eight_bits.quantize(build.denoiser, chosen, eight_bits.FORMATS[name])
    found = sum(isinstance(module, eight_bits.RowwiseLinear) for module in build.denoiser.modules())
    if found != len(chosen):
        raise RuntimeError(f"{name}_rows: {found} layers were quantized, of {len(chosen)} that were chosen")
    return {
        "quantized_linears": found,
        "linears": linears,
        "kept": len(candidates) - len(chosen),
        **fused,
        "calibration_s": calibration_s,
    }


def eligible(build: Build, optimization: str) -> tuple[dict[Any, int], dict[str, Any]]:
    """The rows of each linear layer, and by name the denoiser's layers that are worth eight bits.

    Raises RuntimeError, which names the optimization, where none is.
    """
    shapes, least = _inputs_of_linears(build), LEAST_ROWS[build.spec.device]
    rows = {layer: _rows(shape) for layer, shape in shapes.items()}
    if not (found := worth_eight_bits(build.denoiser, shapes, least)):
        raise RuntimeError(
            f"{optimization}: no linear layer has {least} rows, and features in multiples of 16, within a block: it "
            "takes a larger picture or more of them in a call"
        )
    return rows, found


def eligible_convolutions(build: Build, optimization: str) -> tuple[dict[Any, int], dict[str, Any]]:
    """The pixels that each convolution of the denoiser makes, and by name those that are worth eight bits.

    Raises RuntimeError, which names the optimization, where none is.
    """
    from diffusion_fast import eight_bits

    pixels, least = _pixels_per_convolution(build), LEAST_PIXELS[build.spec.device]
    able = eight_bits.quantizable_convolutions(build.denoiser)
    found = {name: module for name, module in able.items() if pixels.get(module, 0) >= least}
    if not found:
        raise RuntimeError(
            f"{optimization}: no convolution has the channels and makes {least} pixels: it takes a larger picture or "
            "more of them in a call"
        )
    return pixels, found


def worth_eight_bits(network: Any, shapes: dict[Any, tuple[int, ...]], least_rows: int) -> dict[str, Any]:
    """By name the linear layers, given tensors of such `shapes`, that are worth it to be multiplied in eight bits.

    With few rows, reading the weights takes longer than multiplying, and quantizing the input longer than both. What no
    kernel quantizes on the way has to be quantized by one that does nothing else.
    """
    import torch

    # Between the blocks nothing is quantized on the way, there is little work, and all passes there: of SDXL 1.4% of
    # the multiplications, and three quarters of what linear layers lose, squared (docs/experiments.md).
    repeated = blocks(network)
    between = set(outside(network, repeated)) if repeated else set()
    behind, of_others = _behind_attention(network), _of_others(network, shapes)
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
        and len(shapes.get(module, ())) > 2  # two: a row a picture, an embedding of the time step or the like
        and _rows(shapes[module]) >= least_rows
        and module.in_features % 16 == module.out_features % 16 == 0
        and module not in between
        and module not in of_others
        and (module not in behind or min(module.weight.shape) >= LEAST_FEATURES_BEHIND_ATTENTION)
    }


def _behind_attention(network: Any) -> set[Any]:
    """The first layers of what diffusers' attention modules, of every class, call their ways out."""
    import torch

    ways = (getattr(module, name, None) for module in network.modules() for name in ("to_out", "to_add_out"))
    return {way[0] if isinstance(way, torch.nn.ModuleList) else way for way in ways if way is not None}


def _of_others(network: Any, shapes: dict[Any, tuple[int, ...]]) -> set[Any]:
    """What attention projects other tokens by than those that it asks for: the prompt's, which no block has made."""
    return {
        layer
        for module in network.modules()
        for name in ("to_k", "to_v", "to_kv")
        if (layer := getattr(module, name, None)) is not None
        and shapes.get(layer) != shapes.get(getattr(module, "to_q", None))
    }


def _pixels_per_convolution(build: Build) -> dict[Any, int]:
    """How many pixels each convolution of the denoiser makes, of all images, seen in an eager step."""
    import torch

    pixels: dict[Any, int] = {}

    def note(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        pixels[module] = output.numel() // output.shape[1]

    convolutions = [module for module in build.denoiser.modules() if isinstance(module, torch.nn.Conv2d)]
    build.short_call(*(module.register_forward_hook(note) for module in convolutions))
    return pixels


def _inputs_of_linears(build: Build) -> dict[Any, tuple[int, ...]]:
    """The shape of what each linear layer of the denoiser and the VAE is given, seen in an eager step."""
    import torch

    shapes: dict[Any, tuple[int, ...]] = {}

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes[module] = tuple(inputs[0].shape)

    hooks = [
        module.register_forward_pre_hook(note)
        for network in (build.denoiser, build.pipe.vae)
        for module in network.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    build.short_call(*hooks)
    return shapes


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])
