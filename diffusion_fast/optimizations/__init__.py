"""Every optimization: one decorated function each, in the module of its stage.

registry.py       what an optimization is, and the pipeline in the making that it changes
numbers.py        tf32, bf16, fp16, vae_fp16_fix, cudnn_benchmark
layers.py         sdpa, attention_backend, channels_last, no_layout_copies, fused_qkv, conv_as_linear,
                  group_norm_kernels, fused_geglu, fused_add_norm, device_postprocessing, prompt_projections
quantization.py   int8_dynamic, fp8_rows, int8_rows, fp8_convolutions, int8_convolutions
compilation.py    inductor_tuning, persistent_reductions, compile, regional_compile, ahead_of_time,
                  cuda_graph
approximation.py  feature_reuse, feature_forecast, guidance_cutoff, tiny_vae

Imports of torch sit inside the functions, because the parent process plans recipes without it.
"""

from diffusion_fast.optimizations import approximation, compilation, layers, numbers, quantization  # noqa: F401
from diffusion_fast.optimizations.registry import (
    OPTIMIZATIONS,
    STAGES,
    Build,
    Optimization,
    compiles,
    eight_bit_format,
    optimization,
    same_work,
)

__all__ = (
    "OPTIMIZATIONS",
    "STAGES",
    "Build",
    "Optimization",
    "compiles",
    "eight_bit_format",
    "optimization",
    "same_work",
)
