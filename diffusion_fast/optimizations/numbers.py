"""Number formats, and weights that suit them: stage load, but for the VAE's own format."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    """Run every network in bfloat16: fp32's range, 8 bits of mantissa, half the bytes.

    https://arxiv.org/abs/1905.12322
    """
    return _set_dtype(build, "bf16")


@optimization(
    stage="load",
    excludes=("bf16",),
    devices=("cuda",),
    requires_where=("fp16_vae_hub_id", ("vae_fp16_fix", "tiny_vae", "upcast_vae")),
    code="dtype = torch.float16",
)
def fp16(build: Build) -> dict[str, Any]:
    """Run every network in float16: 11 bits of mantissa, half the bytes, overflows past 65504.

    Where a model's own VAE overflows, one that doesn't is required, or the same one in fp32.
    https://arxiv.org/abs/1710.03740
    """
    return _set_dtype(build, "fp16")


def _set_dtype(build: Build, name: str) -> dict[str, Any]:
    import torch

    build.dtype = DTYPES[name]

    def proof() -> dict[str, Any]:
        wanted = getattr(torch, build.dtype)
        for component, network in build.networks():
            if component in build.own_dtypes:
                continue
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


# Not of the stage load: it changes a pipeline that is there, also one that somebody else has loaded.
@optimization(
    stage="swap",
    requires=(("bf16", "fp16"),),
    excludes=("vae_fp16_fix", "tiny_vae"),
    code="""
pipe.vae.to(torch.float32)
decode_in_fp32 = pipe.vae.decode


def decode(latents, *args, **kwargs):
    return decode_in_fp32(latents.float(), *args, **kwargs)


pipe.vae.decode = decode
""",
)
def upcast_vae(build: Build) -> dict[str, Any]:
    """Keep the VAE in fp32, and give it its latents in fp32, while everything else computes in 16 bits.

    As diffusion-fast's --upcast_vae: by weights that 16 bits have rounded. Its pipe.upcast_vae() is deprecated in
    diffusers: https://github.com/huggingface/diffusers/pull/12619
    """
    import torch

    vae = build.pipe.vae
    vae.to(torch.float32)
    vae.decode = functools.partial(_decode_in_fp32, vae.decode)
    build.own_dtypes.add("vae")

    def proof() -> dict[str, Any]:
        if other := {parameter.dtype for parameter in vae.parameters()} - {torch.float32}:
            raise RuntimeError(f"upcast_vae: the VAE has parameters in {other}")
        return {"vae_dtype": "float32"}

    build.proofs["upcast_vae"] = proof
    return {}


def _decode_in_fp32(decode: Callable[..., Any], latents: Any, *args: Any, **kwargs: Any) -> Any:
    """`latents` of shape (batch, channels, height, width), in any dtype, decoded by a VAE in fp32."""
    return decode(latents.float(), *args, **kwargs)


@optimization(stage="load", devices=("cuda",), code="torch.backends.cudnn.benchmark = True")
def cudnn_benchmark(build: Build) -> dict[str, Any]:
    """Let cuDNN time its algorithms for each convolution it meets, and take the fastest, instead of a heuristic's.

    https://docs.pytorch.org/docs/stable/backends.html#torch.backends.cudnn.torch.backends.cudnn.benchmark
    """
    import torch

    torch.backends.cudnn.benchmark = True
    return {"benchmark": torch.backends.cudnn.benchmark}
