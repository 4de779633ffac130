"""Every optimization: one decorated function each, in the module of its stage.

registry.py       what an optimization is, and the pipeline in the making that it changes
numbers.py        tf32, bf16, fp16, vae_fp16_fix
layers.py         sdpa, channels_last, fused_qkv, conv_as_linear
quantization.py   int8_dynamic
compilation.py    inductor_tuning, compile, regional_compile

Imports of torch sit inside the functions, because the parent process plans recipes without it.
"""

from diffusion_fast.optimizations import compilation, layers, numbers, quantization  # noqa: F401 - they register
from diffusion_fast.optimizations.registry import OPTIMIZATIONS, STAGES, Build, Optimization, compiles, optimization

__all__ = ("OPTIMIZATIONS", "STAGES", "Build", "Optimization", "compiles", "optimization")
