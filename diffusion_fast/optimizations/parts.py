"""What a call does beside denoising: encode a prompt once, decode pictures in pieces, know where networks are."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from diffusion_fast import adapters
from diffusion_fast.optimizations.registry import Build, optimization


# TAESD needs neither: it is a thirtieth of a VAE's decoder.
@optimization(stage="swap", excludes=("tiny_vae",), least_batch=2, code="pipe.vae.enable_slicing()")
def vae_slicing(build: Build) -> dict[str, Any]:
    """Decode the pictures of a batch one by one: the decoder's memory is that of a single one.

    https://huggingface.co/docs/diffusers/optimization/memory
    """
    vae = build.pipe.vae
    if not hasattr(vae, "_decode"):
        raise RuntimeError(f"vae_slicing: {type(vae).__name__} doesn't say how it decodes a single picture")
    vae.enable_slicing()
    rows: list[int] = []
    vae._decode = _noting(vae._decode, lambda latents: rows.append(latents.shape[0]))

    def proof() -> dict[str, Any]:
        if set(rows) != {1}:
            raise RuntimeError(f"vae_slicing: {sorted(set(rows))} pictures were decoded at once")
        return {"slices": len(rows)}

    build.proofs["vae_slicing"] = proof
    return {}


TILE = 512  # pixels, or half of the picture where that is less
OVERLAP = 4  # a quarter of a tile, of its latents too: these are a multiple of it


@optimization(
    stage="swap",
    excludes=("tiny_vae",),
    lossless=False,
    code=f"""
scale = pipe.vae_scale_factor
latents = max({OVERLAP}, min({TILE}, max($height, $width) // 2) // scale // {OVERLAP} * {OVERLAP})
tile = latents * scale
if hasattr(pipe.vae, "tile_latent_min_size"):
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = latents, tile
else:  # the deep-compression autoencoder
    pipe.vae.enable_tiling(tile, tile, tile - tile // {OVERLAP}, tile - tile // {OVERLAP})
""",
)
def vae_tiling(build: Build) -> dict[str, Any]:
    """Decode a picture in overlapping tiles of 512 pixels, or half its size, and blend them: less memory, more work.

    Group norms then know their tile alone. https://huggingface.co/docs/diffusers/optimization/memory
    """
    vae, scale = build.pipe.vae, build.pipe.vae_scale_factor
    side = max(build.spec.height, build.spec.width)
    latents = max(OVERLAP, min(TILE, side // 2) // scale // OVERLAP * OVERLAP)
    tile = latents * scale
    if tile >= side:
        raise RuntimeError(f"vae_tiling: a picture of {side} pixels is no larger than the smallest tile, {tile} pixels")
    if not hasattr(vae, "tiled_decode"):
        raise RuntimeError(f"vae_tiling: {type(vae).__name__} doesn't decode in tiles")
    if hasattr(vae, "tile_latent_min_size"):
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = latents, tile
    else:  # the deep-compression autoencoder
        vae.enable_tiling(tile, tile, tile - tile // OVERLAP, tile - tile // OVERLAP)
    pictures: list[int] = []
    vae.tiled_decode = _noting(vae.tiled_decode, lambda latents: pictures.append(latents.shape[0]))

    def proof() -> dict[str, Any]:
        if not pictures:
            raise RuntimeError("vae_tiling: nothing was decoded in tiles")
        return {"tiled_pictures": sum(pictures)}

    build.proofs["vae_tiling"] = proof
    return {"tile_pixels": tile}


def _noting(function: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(latents: Any, *args: Any, **kwargs: Any) -> Any:
        note(latents)
        return function(latents, *args, **kwargs)

    return call


@optimization(stage="hoist", leaves_out="text_encoding")
def prompt_embedding_cache(build: Build) -> dict[str, Any]:
    """Encode each prompt once: calls that repeat it, as all timed ones do, are without the time of text encoding.

    What a server gains that is asked for one prompt many times, and nobody else.
    https://huggingface.co/docs/diffusers/using-diffusers/weighted_prompts
    """
    encoders = [network for name, network in build.networks() if name.startswith("text_encoder")]
    if not encoders or not hasattr(build.pipe, "encode_prompt"):
        raise RuntimeError(f"prompt_embedding_cache: {type(build.pipe).__name__} encodes no prompt by a text encoder")
    kept = KeptEmbeddings(build.pipe.encode_prompt, encoders)
    build.pipe.encode_prompt = functools.wraps(build.pipe.encode_prompt)(kept)

    def proof() -> dict[str, Any]:
        if not kept.reused:
            raise RuntimeError(f"prompt_embedding_cache: {kept.encoded} prompts were encoded, and none was reused")
        return {"encoded": kept.encoded, "reused": kept.reused}

    build.proofs["prompt_embedding_cache"] = proof
    return {"text_encoders": len(encoders)}


@optimization(stage="hoist")
def no_module_walks(build: Build) -> dict[str, Any]:
    """Know where networks are: diffusers walks through all of their modules for it, several times a call.

    The device waits meanwhile. What is looked for are hooks, https://github.com/huggingface/diffusers/pull/10503
    """
    from diffusion_fast import walks

    before = build.pipe._execution_device
    try:
        networks = walks.spare(build.pipe, "no_module_walks")
    except ValueError as error:
        raise RuntimeError(f"no_module_walks: {error}") from error
    if build.pipe._execution_device != before:
        raise RuntimeError(f"no_module_walks: the pipeline is at {build.pipe._execution_device} instead of {before}")
    return {"networks": networks}


MOST_PROMPTS = 64  # the oldest goes: a few MB each


class KeptEmbeddings:
    """A pipeline's `encode_prompt`, which keeps what it returned for arguments that are plain values.

    The caller gets copies. Tensors among the arguments, such as embeddings of one's own, are left to the pipeline. All
    is forgotten when an adapter of a text encoder comes, goes or is applied more or less strongly.
    """

    def __init__(self, encode: Callable[..., Any], encoders: list[Any]) -> None:
        self.encode, self.encoders = encode, encoders
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.strengths = self._strengths()
        self.encoded = self.reused = 0
        for encoder in encoders:
            adapters.when_changed(encoder, self.kept.clear)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch.utils._pytree import tree_map

        if self._strengths() != self.strengths:
            self.kept.clear()
            self.strengths = self._strengths()
        try:
            key = _plain(args), _plain(tuple(sorted(kwargs.items())))
        except TypeError:
            return self.encode(*args, **kwargs)
        if key in self.kept:
            self.reused += 1
        else:
            self.encoded += 1
            self.kept[key] = self.encode(*args, **kwargs)
            while len(self.kept) > MOST_PROMPTS:
                self.kept.popitem(last=False)
        return tree_map(lambda value: value.clone() if hasattr(value, "clone") else value, self.kept[key])

    def _strengths(self) -> Hashable:
        return tuple(adapters.strengths(encoder) for encoder in self.encoders)


def _plain(value: Any) -> Hashable:
    """Values that are told apart by what they are. TypeError for others."""
    import torch

    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    if value is None or isinstance(value, str | int | float | torch.device | torch.dtype):
        return value
    raise TypeError(f"{type(value).__name__} isn't a plain value")
