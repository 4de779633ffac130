"""Recipes and ladders: names only. What a name does is in optimizations/."""

from __future__ import annotations

from dataclasses import replace

from diffusion_fast.spec import Recipe

# The six published rungs of "Accelerating Generative AI III: Diffusion, Fast". Its code sets some of these names
# without saying so: TF32 in every rung, channels_last and 1x1 convolutions as linears wherever it compiles.
BASELINE = Recipe("baseline", ("tf32",))
BF16 = BASELINE.plus("bf16", "bf16")
SDPA = BF16.plus("sdpa", "sdpa")
COMPILE = SDPA.plus("compile", "channels_last", "conv_as_linear", "compile", "inductor_tuning")
FUSED_QKV = COMPILE.plus("fused-qkv", "fused_qkv")
INT8_DYNAMIC = FUSED_QKV.plus("int8-dynamic", "int8_dynamic")

PROGRESSIVE = (BASELINE, BF16, SDPA, COMPILE, FUSED_QKV, INT8_DYNAMIC)
# The compiled rungs once more in mode default, for where max-autotune takes longer than there is time. Without
# inductor_tuning, which diffusion-fast sets in mode max-autotune alone: its coordinate descent is what takes longest.
DEFAULT_MODE = tuple(
    Recipe(
        f"{recipe.name}-default",
        tuple(name for name in recipe.optimizations if name != "inductor_tuning"),
        compile_mode="default",
    )
    for recipe in (COMPILE, FUSED_QKV, INT8_DYNAMIC)
)

# Past the published rungs, nothing lost: little to compile, one launch a network, and what the profile shows between.
# The published last rung stands in it in mode default, because max-autotune takes longer than all the others together.
REGIONAL = replace(SDPA, usual_mode="default").plus("regional", "channels_last", "fused_qkv", "regional_compile")
GRAPH = REGIONAL.plus("graph", "cuda_graph")
HOST = GRAPH.plus("postprocessing", "device_postprocessing")
CUDNN = HOST.plus("cudnn", "cudnn_benchmark")  # gained nothing on an H100, so the next ones do without
LAYOUT = HOST.plus("layout", "no_layout_copies")
NORMS = LAYOUT.plus("norms", "group_norm_kernels")
ATTENTION = NORMS.plus("attention", "attention_backend")
PERSISTENT = ATTENTION.plus("persistent", "persistent_reductions")
GEGLU = PERSISTENT.plus("geglu", "fused_geglu")
PROMPT = GEGLU.plus("prompt", "prompt_projections")
ADD_NORM = PROMPT.plus("add-norm", "fused_add_norm")
TIME = ADD_NORM.plus("time", "time_projections")
VAE = TIME.plus("vae", "sliced_vae_attention")
WALKS = VAE.plus("walks", "no_module_walks")
LOSSLESS = WALKS.plus("attention-kernel", "attention_kernel")
FP8 = LOSSLESS.plus("fp8", "fp8_rows")
INT8 = LOSSLESS.plus("int8", "int8_rows")
# In fp8 convolutions lose too much: 8.8% of a step.
CONVOLUTIONS = FP8.plus("convolutions", "int8_convolutions")

# Less work for nearly the same picture, and beside it the plain recipe with fewer steps: its control.
PLAIN = replace(LOSSLESS, name="plain")
EIGHT_BITS = replace(CONVOLUTIONS, name="8-bits")


def controls(recipe: Recipe, *shares: float) -> tuple[Recipe, ...]:
    return tuple(replace(recipe, name=f"{recipe.name}-{round(100 * each)}", steps_share=each) for each in shares)


FORECAST = PLAIN.plus("feature-forecast", "feature_forecast")
FORECAST_8_BITS = FORECAST.plus("forecast-8-bits", "fp8_rows", "int8_convolutions")

# What diffusers' hooks do can't be compiled, so it has controls in eager mode.
EAGER = replace(SDPA, name="eager")
HOOKED = (
    EAGER.plus("eager-feature-reuse", "feature_reuse"),
    EAGER.plus("eager-first-block-cache", "first_block_cache"),
    EAGER.plus("eager-pyramid-attention", "pyramid_attention_broadcast"),
)

# For a GPU with little memory: each by itself, and two together. Eager, for layerwise casting can't be compiled;
# vae_slicing has a use for batches alone.
SMALLER = (
    EAGER.plus("vae-tiling", "vae_tiling"),
    EAGER.plus("layerwise-casting", "layerwise_casting"),
    EAGER.plus("int8-weights", "int8_weight_only"),
    EAGER.plus("fp8-weights", "fp8_weight_only"),
    EAGER.plus("int4-weights", "int4_weight_only"),
    EAGER.plus("int4-and-tiling", "int4_weight_only", "vae_tiling"),
)

# Ladders about one recipe, which can be another than the one that is written here.
AA = "aa"  # under two names: what differs between them is the noise of the machine
ABLATION = "ablation"  # and then without each of its names in turn: plan.find_ladder makes these
ABOUT_ONE = (AA, ABLATION)
LADDERS: dict[str, tuple[Recipe, ...]] = {
    "progressive": PROGRESSIVE,
    "progressive-modes": (*PROGRESSIVE, *DEFAULT_MODE),
    "fast": (
        *(BASELINE, DEFAULT_MODE[-1], REGIONAL, GRAPH, HOST, CUDNN, LAYOUT, NORMS, ATTENTION, PERSISTENT, GEGLU),
        *(PROMPT, ADD_NORM, TIME, VAE, WALKS, LOSSLESS, INT8, FP8, CONVOLUTIONS),
    ),
    "turbo": (
        PLAIN,
        *controls(PLAIN, 0.8, 0.67, 0.5, 0.4, 0.33, 0.27, 0.2),
        PLAIN.plus("guidance-cutoff", "guidance_cutoff"),
        PLAIN.plus("tiny-vae", "tiny_vae"),
        PLAIN.plus("feature-reuse", "feature_reuse"),
        FORECAST,
        FORECAST.plus("cutoff-and-forecast", "guidance_cutoff"),
        FORECAST.plus("all", "guidance_cutoff", "tiny_vae"),
        EIGHT_BITS,
        *controls(EIGHT_BITS, 0.67, 0.57, 0.5, 0.4),
        FORECAST_8_BITS,
        FORECAST_8_BITS.plus("cutoff-and-forecast-8-bits", "guidance_cutoff"),
        FORECAST_8_BITS.plus("all-8-bits", "guidance_cutoff", "tiny_vae"),
    ),
    "turbo-eager": (EAGER, *controls(EAGER, 0.8, 0.67, 0.5, 0.4, 0.33), *HOOKED),
    "memory": (EAGER, *SMALLER),
    "cpu": (SDPA, COMPILE, FUSED_QKV),  # its three experiments on a CPU
    ABLATION: (replace(LOSSLESS, name="full"),),
    AA: (replace(SDPA, name="a"), replace(SDPA, name="b")),
}
