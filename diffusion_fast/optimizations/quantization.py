"""Stage quantize: fewer bits a number."""

from __future__ import annotations

import time
from typing import Any

from diffusion_fast.optimizations.registry import Build, optimization


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
