"""From a spec to a pipeline: load the baseline, then let each optimization change it, stage by stage."""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_fast import outliers
from diffusion_fast.models import PACKAGE, model_of, verify
from diffusion_fast.optimizations import OPTIMIZATIONS, Build
from diffusion_fast.spec import RunSpec


def build_pipeline(spec: RunSpec, tell: Callable[[str], None]) -> tuple[Build, dict[str, dict[str, Any]]]:
    """A pipeline on its device, and each optimization's account of what it did.

    `tell` is called with what is being done. Raises RuntimeError where an optimization has no effect.
    """
    build = Build(model_of(spec), spec)
    no_tf32()
    applied = apply(build, tell, before_loading=True)
    tell("loading")
    build.pipe = _load(build)
    _vanilla_attention(build)
    return build, applied | apply(build, tell, before_loading=False)


def apply(build: Build, tell: Callable[[str], None], before_loading: bool) -> dict[str, dict[str, Any]]:
    """Apply the spec's optimizations of the stage `load`, or all others. Returns what each says that it did."""
    chosen = [OPTIMIZATIONS[name] for name in build.spec.optimizations]
    applied: dict[str, dict[str, Any]] = {}
    for optimization in chosen:
        if (optimization.stage == "load") == before_loading:
            if not before_loading:
                tell(f"applying {optimization.name}")
            applied[optimization.name] = optimization.apply(build)
    if not before_loading:
        _refuse_adapters(build, [each.name for each in chosen if not each.takes_adapters])
    return applied


def _refuse_adapters(build: Build, names: list[str]) -> None:
    """Where layers are gone that a LoRA is for, attaching one would leave it out in part, or fail far from here."""
    if not names:
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{' and '.join(names)} can't take an adapter any more: attach it before they are applied.")

    for method in ("load_lora_adapter", "add_adapter"):
        if hasattr(build.denoiser, method):
            setattr(build.denoiser, method, refuse)


def call(build: Build) -> list[Any]:
    """One whole call, prompt to PIL images, the same images every time. Returns `batch_size` images."""
    import torch

    spec = build.spec
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    noise = torch.randn((spec.batch_size, *_noise_shape(build)), generator=generator)
    return _paint(build, spec.prompt, spec.batch_size, generator, noise)


def call_for(build: Build, prompts: list[str], seeds: list[int]) -> list[Any]:
    """One call for `batch_size` different prompts: a PIL image each, from a seed of its own."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(_noise_shape(build), generator=each) for each in generators])
    return _paint(build, prompts, 1, generators, noise)


def _noise_shape(build: Build) -> tuple[int, int, int]:
    """Of one image's latents, as the VAE decodes them."""
    scale = build.pipe.vae_scale_factor
    return (build.pipe.vae.config.latent_channels, build.spec.height // scale, build.spec.width // scale)


def _paint(build: Build, prompts: str | list[str], images_per_prompt: int, generator: Any, noise: Any) -> list[Any]:
    """`noise` is drawn on the CPU and in fp32, so that every device and dtype starts from the same.

    Left to itself the pipeline draws it in its own dtype, which gave a bf16 rung another image than the fp32 one
    (docs/experiments.md). Device and dtype are those that were asked for: a network walks through all of its modules
    to answer, which took SDXL 5 to 10 ms a call that a user's call doesn't take.
    """
    import torch

    spec = build.spec
    if hasattr(build.pipe, "_pack_latents"):  # its denoiser takes rows of 2×2 latents, and it asks for them as rows
        noise = build.pipe._pack_latents(noise, *noise.shape)
    images: list[Any] = build.pipe(
        prompts,
        num_inference_steps=spec.steps,
        guidance_scale=spec.guidance_scale,
        height=spec.height,
        width=spec.width,
        num_images_per_prompt=images_per_prompt,
        generator=generator,
        latents=noise.to(spec.device, getattr(torch, build.dtype)),
        **dict(build.model.call_arguments),
        **build.call_arguments,
    ).images
    return images


def one_image_at_a_time(build: Build) -> None:
    """From here on denoiser and VAE compute each image of a batch as if it were alone, with its guidance.

    An image is what it would be without the others then, however large a batch makes the tensors. In a batch of eight
    of SDXL torch 2.11's eager fp32 doesn't give that (docs/experiments.md).
    """
    images = build.spec.batch_size
    if images > 1:
        build.denoiser.forward = in_parts(build.denoiser, "forward", images)
        build.pipe.vae.decode = in_parts(build.pipe.vae, "decode", images)


def in_parts(network: Any, method: str, count: int) -> Any:
    """`network.method`, its batch in `count` parts one after the other. A copy of the network has its own.

    A batch is as large as the first tensor that it is given has rows; all others with as many rows are of it. A part is
    every `count`-th row: guidance has all images without the prompt first, and then all with it.
    """
    import torch
    from torch.utils import _pytree as pytree

    whole = getattr(type(network), method)

    def together(*parts: Any) -> Any:
        return torch.stack(parts, 1).flatten(0, 1) if isinstance(parts[0], torch.Tensor) else parts[0]

    @functools.wraps(whole)
    def parted(self: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)
        if rows % count:  # fewer than images: a call for one, of which operations are counted
            return whole(self, *args, **kwargs)

        def split(leaf: Any) -> Any:
            batched = isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == rows
            return [leaf[index::count] if batched else leaf for index in range(count)]

        outputs = []
        for part in zip(*map(split, leaves), strict=True):
            part_args, part_kwargs = pytree.tree_unflatten(list(part), tree)
            outputs.append(whole(self, *part_args, **part_kwargs))
        return pytree.tree_map(together, *outputs)

    return types.MethodType(parted, network)


def no_tf32() -> None:
    """cuDNN's default is on, and the baseline is plain fp32."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _load(build: Build) -> Any:
    import diffusers
    import torch

    dtype = getattr(torch, build.dtype)
    if build.spec.weights == "random":
        pipe = _from_configs(build)
        pipe.to(build.spec.device, dtype)
    else:
        pipeline_class = getattr(diffusers, build.model.pipeline)
        parts: dict[str, Any] = {}
        if build.fp16_vae:
            vae_source = build.model.fp16_vae_hub_id
            parts["vae"] = diffusers.AutoencoderKL.from_pretrained(vae_source, dtype=dtype)
        if build.tiny_vae:
            parts["vae"] = diffusers.AutoencoderTiny.from_pretrained(build.model.tiny_vae_hub_id, dtype=dtype)
        source = {
            "embedded": str(PACKAGE / build.model.embedded),
            "pretrained": build.model.hub_id,
        }.get(build.spec.weights, build.spec.weights)
        verify(Path(source), required=build.spec.weights == "embedded")
        parts |= dict.fromkeys(build.model.left_out)
        pipe = pipeline_class.from_pretrained(source, dtype=dtype, use_safetensors=True, **parts)
        pipe.to(build.spec.device)
    if build.model.scheduler:
        pipe.scheduler = getattr(diffusers, build.model.scheduler).from_config(pipe.scheduler.config)
    if build.model.outliers and build.spec.weights != "random":
        outliers.put_in(getattr(pipe, build.model.denoiser))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _from_configs(build: Build) -> Any:
    """The model at full size with seeded random weights: default initialisation, in fp32, on the device itself.

    The same device and library versions give the same weights, whatever the recipe's dtype is.
    """
    import diffusers
    import torch

    pipeline_class = getattr(diffusers, build.model.pipeline)
    folder = PACKAGE / "configs" / build.model.configs
    files = {name: folder / f"{name}.json" for name in inspect.signature(pipeline_class.__init__).parameters}
    if build.fp16_vae:
        files["vae"] = folder / f"{build.model.fp16_vae_config}.json"
    configs = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    if build.tiny_vae:
        # By its defaults, which are TAESD's; those for other models differ in the latents alone.
        configs["vae"] = {"_class_name": "AutoencoderTiny", "latent_channels": configs["vae"]["latent_channels"]}
    parts: dict[str, Any] = dict.fromkeys(build.model.left_out)
    for name, config in configs.items():
        torch.manual_seed(0)  # each, so that another VAE doesn't come with other text encoders
        if name == "scheduler":
            parts[name] = _from_config(config)
            continue
        with torch.device(build.spec.device):
            parts[name] = _from_config(config).eval().requires_grad_(False)
        if name.startswith("text_encoder"):
            parts[name.replace("text_encoder", "tokenizer")] = _tokenizer(config)
    if build.model.outliers:
        outliers.put_in(parts[build.model.denoiser])  # in fp32: every dtype then rounds the same weights
    return pipeline_class(**parts)


def _from_config(config: dict[str, Any]) -> Any:
    """A component of diffusers or transformers, by the class that its config names."""
    import diffusers
    import transformers

    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    kind = transformers.AutoConfig.for_model(**config)
    return getattr(transformers, config["architectures"][0])(kind)


def _tokenizer(config: dict[str, Any]) -> Any:
    """One for a text encoder that needs no vocabulary file: its tokens are bytes.

    But for one whose pipeline puts instructions before each prompt, so that it isn't padded to a length of its own.
    """
    from transformers import ByT5Tokenizer

    if config["model_type"] == "gemma2":
        return word_tokenizer(config["vocab_size"])
    return ByT5Tokenizer() if config["model_type"] == "t5" else byte_tokenizer()


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer whose tokens are words, and ids below `vocabulary` their checksums: it needs no vocabulary file.

    Of English it makes about as many tokens as one with a large vocabulary does, and encoding the text costs as much.
    """
    from transformers import ByT5Tokenizer

    class WordTokenizer(ByT5Tokenizer):  # type: ignore[misc]
        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return re.findall(r"\w+|[^\w\s]", text)

        def _convert_token_to_id(self, token: str) -> int:
            special = len(self.all_special_ids)
            return special + zlib.crc32(token.encode()) % (vocabulary - special)

    return WordTokenizer(extra_ids=0)


def byte_tokenizer(start_id: int = 49406) -> Any:
    """A CLIP tokenizer that knows single bytes only, so that it needs no vocabulary file.

    SDXL's text encoders take the position of the highest id as the end of the text, so the special tokens come last:
    `start_id` and the one after it. A config that names the end's id, as the bundled model's does, needs no such order.
    """
    from transformers import CLIPTokenizer

    # CLIP writes byte values as printable characters; a byte that ends a word is another token.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + index for index in range(256 - len(printable))]
    letters = [chr(code) for code in printable + others]
    vocabulary = {token: index for index, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": start_id, "<|endoftext|>": start_id + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _vanilla_attention(build: Build) -> None:
    """The baseline's attention: scores as one explicit matrix, in the denoiser, the VAE and the text encoders."""
    from diffusers.models.attention_processor import AttnProcessor

    from diffusion_fast import scores

    for _, network in build.networks():
        if hasattr(network, "set_default_attn_processor"):
            network.set_default_attn_processor()
            if {type(processor) for processor in network.attn_processors.values()} != {AttnProcessor}:
                scores.write_out(network)  # HunyuanDiT's default is a fused kernel
        elif hasattr(network, "set_attn_processor") or network is build.denoiser:
            scores.write_out(network)
        elif hasattr(network, "set_attn_implementation"):
            network.set_attn_implementation("eager")
