"""Stage quantize: fewer bits a number."""

from __future__ import annotations

import time
from typing import Any

from diffusion_fast.optimizations.registry import Build, eight_bit_format, optimization


@optimization(
    stage="quantize",
    requires=(("bf16", "fp16"), ("compile", "regional_compile")),
    min_capability=(8, 0),
    imports=("torchao.quantization",),
    lossless=False,
    takes_adapters=False,
    code="""
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

rows = {}  # of each linear layer, seen in an eager step


def note(module, inputs):
    rows[module] = inputs[0].numel() // inputs[0].shape[-1]


linears = [
    module
    for network in (denoiser, pipe.vae)
    for module in network.modules()
    if isinstance(module, torch.nn.Linear)
]
hooks = [module.register_forward_pre_hook(note) for module in linears]
pipe(**arguments | {"num_inference_steps": $least_steps})
for hook in hooks:
    hook.remove()
excluded = set($int8_excluded_shapes)


def takes_int8(module, *_):
    if not isinstance(module, torch.nn.Linear) or rows.get(module, 0) <= 16:
        return False
    if module.in_features <= 16 or module.in_features % 8 or module.out_features % 8:
        return False
    return (module.in_features, module.out_features) not in excluded


for network in (denoiser, pipe.vae):
    quantize_(network, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=takes_int8)
""",
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


LEAST_ROWS = {"cuda": 256, "cpu": 17}


@optimization(
    stage="quantize",
    requires=("bf16", ("compile", "regional_compile", "ahead_of_time")),
    excludes=("int8_dynamic",),
    min_capability=(8, 9),
    imports=("diffusion_fast.eight_bits",),
    lossless=False,
    takes_adapters=False,
    number_format="fp8",
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
    excludes=("int8_dynamic", "fp8_rows"),
    min_capability=(9, 0),
    imports=("diffusion_fast.eight_bits",),
    lossless=False,
    takes_adapters=False,
    number_format="int8",
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
)
def int8_convolutions(build: Build) -> dict[str, Any]:
    """Convolve the denoiser's images in int8: a scale an image, and one for each output channel of the weights.

    By the kernel of fp8_convolutions. Within one scale int8 has the finer steps, but for numbers that are small beside
    the largest. https://arxiv.org/abs/1410.0759
    """
    return _eight_bit_convolutions(build, "int8")


def _eight_bit_convolutions(build: Build, number_format: str) -> dict[str, Any]:
    """Quantize every convolution of the denoiser that has the channels."""
    import torch

    from diffusion_fast import eight_bits

    halvings = sum(type(module).__name__ == "Downsample2D" for module in build.denoiser.modules())
    smallest = 2**halvings * build.pipe.vae_scale_factor
    if build.spec.height % smallest or build.spec.width % smallest:
        raise RuntimeError(
            f"{number_format}_convolutions: height and width have to be multiples of {smallest} pixels here"
        )
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in build.denoiser.modules())
    quantized = eight_bits.quantize_convolutions(build.denoiser, eight_bits.FORMATS[number_format])
    if not quantized:
        raise RuntimeError(f"{number_format}_convolutions: no convolution has the channels")
    return {"quantized_convolutions": quantized, "convolutions": convolutions}


def _eight_bits(build: Build) -> dict[str, Any]:
    """Quantize every linear of the denoiser that has the rows and the features, but for those that the run keeps."""
    import torch

    from diffusion_fast import eight_bits

    name = eight_bit_format(build.spec.optimizations)
    start = time.perf_counter()
    _, candidates = eligible(build)
    calibration_s = time.perf_counter() - start
    linears = {each for each, module in build.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    if unknown := set(build.spec.kept) - linears:
        raise RuntimeError(f"{name}_rows: the denoiser has no linear layer {min(unknown)}, which was to be kept")
    chosen = {module for each, module in candidates.items() if each not in build.spec.kept}
    if not chosen:
        raise RuntimeError(f"{name}_rows: no layer has the rows and the features")
    fused = eight_bits.quantize(build.denoiser, chosen, eight_bits.FORMATS[name])
    found = sum(isinstance(module, eight_bits.RowwiseLinear) for module in build.denoiser.modules())
    if found != len(chosen):
        raise RuntimeError(f"{name}_rows: {found} layers were quantized, of {len(chosen)} that were chosen")
    return {
        "quantized_linears": found,
        "linears": len(linears),
        "kept": len(build.spec.kept),
        "fused_feed_forwards": fused,
        "calibration_s": calibration_s,
    }


def eligible(build: Build) -> tuple[dict[Any, int], dict[str, Any]]:
    """The rows of each linear layer, and by name the denoiser's layers that are worth eight bits.

    With few rows, reading the weights takes longer than multiplying, and quantizing the input longer than both.
    """
    import torch

    rows = _rows_per_linear(build)
    return rows, {
        name: module
        for name, module in build.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear)
        and rows.get(module, 0) >= LEAST_ROWS[build.spec.device]
        and module.in_features % 16 == module.out_features % 16 == 0
    }


def _rows_per_linear(build: Build) -> dict[Any, int]:
    """How many rows each linear layer of the denoiser and the VAE multiplies, seen in an eager step."""
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
    build.short_call(*hooks)
    return rows
