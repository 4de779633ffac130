"""Stage load: number formats, and weights that suit them."""

from __future__ import annotations

from typing import Any

from diffusion_fast.optimizations.registry import Build, optimization
from diffusion_fast.spec import DTYPES


@optimization(
    stage="load",
    devices=("cuda",),
    code="""
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True
""",
)
def tf32(build: Build) -> dict[str, Any]:
    """Let fp32 matmuls and cuDNN convolutions round their inputs to TF32's 10 bits of mantissa.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    import torch

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return {"matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.allow_tf32}


@optimization(stage="load", excludes=("fp16",), code="dtype = torch.bfloat16")
def bf16(build: Build) -> dict[str, Any]:
    """Run every network in bfloat16: fp32's range, 8 bits of mantissa, half the bytes."""
    return _set_dtype(build, "bf16")


@optimization(
    stage="load",
    excludes=("bf16",),
    devices=("cuda",),
    requires_where=("fp16_vae_hub_id", ("vae_fp16_fix", "tiny_vae")),
    code="dtype = torch.float16",
)
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
            # transformers leaves in fp32 what its authors found to overflow in fp16.
            kept = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
            parameters = (
                p for name, p in network.named_parameters() if not any(part in kept for part in name.split("."))
            )
            other = {p.dtype for p in parameters if p.is_floating_point() and p.dtype != wanted}
            if other:
                raise RuntimeError(f"{name}: {component} still has parameters in {other}")
        return {"dtype": build.dtype}

    build.proofs[name] = proof
    return {}


@optimization(
    stage="load",
    model_needs="fp16_vae_hub_id",
    code="""
from diffusers import AutoencoderKL
parts["vae"] = AutoencoderKL.from_pretrained("$fp16_vae_hub_id", dtype=torch.$dtype)
""",
)
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


@optimization(stage="load", devices=("cuda",), code="torch.backends.cudnn.benchmark = True")
def cudnn_benchmark(build: Build) -> dict[str, Any]:
    """Let cuDNN time its algorithms for each convolution it meets, and take the fastest, instead of a heuristic's.

    https://docs.pytorch.org/docs/stable/backends.html#torch.backends.cudnn.torch.backends.cudnn.benchmark
    """
    import torch

    torch.backends.cudnn.benchmark = True
    return {"benchmark": torch.backends.cudnn.benchmark}
