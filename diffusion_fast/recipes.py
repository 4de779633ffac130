"""Recipes and ladders: names only. What a name does is in optimizations/."""

from __future__ import annotations

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

AA = "aa"
LADDERS: dict[str, tuple[Recipe, ...]] = {
    "progressive": PROGRESSIVE,
    "progressive-modes": (*PROGRESSIVE, *DEFAULT_MODE),
    "cpu": (SDPA, COMPILE, FUSED_QKV),  # its three experiments on a CPU
    # One recipe under two names: what differs between them is the noise of the machine.
    AA: (Recipe("a", SDPA.optimizations), Recipe("b", SDPA.optimizations)),
}
