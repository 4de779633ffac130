"""Every optimization: one decorated function each, in the module of its stage.

registry.py       what an optimization is, and the pipeline in the making that it changes
numbers.py        tf32, bf16, fp16, vae_fp16_fix, upcast_vae, cudnn_benchmark
layers.py         sdpa, attention_backend, attention_kernel, channels_last, no_layout_copies, fused_qkv, conv_as_linear,
                  group_norm_kernels, fused_geglu, fused_add_norm, device_postprocessing, prompt_projections,
                  time_projections, sliced_vae_attention
quantization.py   int8_dynamic, fp8_dynamic, fp8_dynamic_tensor, int8_weight_only, fp8_weight_only,
                  int4_weight_only, layerwise_casting, fp8_rows, int8_rows, fp8_convolutions, int8_convolutions
parts.py          vae_slicing, vae_tiling, no_module_walks, prompt_embedding_cache
compilation.py    inductor_tuning, persistent_reductions, compile, regional_compile, ahead_of_time,
                  cuda_graph
approximation.py  feature_reuse, feature_forecast, first_block_cache, pyramid_attention_broadcast,
                  guidance_cutoff, tiny_vae

Imports of torch sit inside the functions, because the parent process plans recipes without it.
"""

from diffusion_fast.optimizations import approximation, compilation, layers, numbers, parts, quantization  # noqa: F401
from diffusion_fast.optimizations.registry import (
    OPTIMIZATIONS,
    STAGES,
    WORDS,
    Build,
    Optimization,
    compiles,
    eight_bit_formats,
    left_out,
    needs_guidance,
    optimization,
    same_work,
)

__all__ = (
    "OPTIMIZATIONS",
    "STAGES",
    "WORDS",
    "Build",
    "Optimization",
    "compiles",
    "eight_bit_formats",
    "left_out",
    "needs_guidance",
    "optimization",
    "same_work",
)
