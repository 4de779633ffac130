"""Every model in a few hundred kilobytes: its own configs, each number of them made small."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import HunyuanDiT2DModel
from transformers import ByT5Tokenizer

from diffusion_fast.models import MODELS, PACKAGE
from diffusion_fast.optimizations import Build
from diffusion_fast.pipeline import _from_configs
from diffusion_fast.plan import Device, Settings, plan_ladder
from diffusion_fast.spec import Model, Recipe

NAMES = tuple(name for name, model in MODELS.items() if model.configs and not model.outliers)
CONTEXT = 32  # numbers of a token, of each text encoder that is CLIP's
LONG_CONTEXT = 64  # and of the others, at least as many as of two of CLIP's together

Config = dict[str, Any]


def _clip(config: Config) -> Config:
    small = {"hidden_size": CONTEXT, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return small | {"projection_dim": CONTEXT}


def _t5(config: Config) -> Config:
    return {"d_model": LONG_CONTEXT, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 512}


def _gemma(config: Config) -> Config:
    small = {"hidden_size": LONG_CONTEXT, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    return small | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}


def _vae(config: Config) -> Config:
    return {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8, "layers_per_block": 1}


def _at_most_two(layers: Any) -> Any:
    """How many transformer blocks follow each other, as it is for a level or each of its layers."""
    return [_at_most_two(each) for each in layers] if isinstance(layers, list) else min(layers, 2)


def _unet(config: Config) -> Config:
    levels = len(config["block_out_channels"])
    two_encoders = config.get("addition_embed_type") == "text_time"
    small: Config = {
        "block_out_channels": [16 * (level + 1) for level in range(levels)],
        "attention_head_dim": [2] * levels if isinstance(config["attention_head_dim"], list) else 4,
        "norm_num_groups": 8,
        "cross_attention_dim": 2 * CONTEXT if two_encoders else CONTEXT,
    }
    for layers in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if config.get(layers) is not None:
            small[layers] = _at_most_two(config[layers])
    if two_encoders:
        small["projection_class_embeddings_input_dim"] = CONTEXT + 6 * config["addition_time_embed_dim"]
    return small


def _pixart(config: Config) -> Config:
    heads, dim = 2, 24
    return {
        "num_layers": 2,
        "num_attention_heads": heads,
        "attention_head_dim": dim,
        "cross_attention_dim": heads * dim,
        "caption_channels": LONG_CONTEXT,
    }


def _flux(config: Config) -> Config:
    return {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": LONG_CONTEXT,
        "pooled_projection_dim": CONTEXT,
    }


def _sd3(config: Config) -> Config:
    return {
        "num_layers": 3,
        "dual_attention_layers": [0, 1],
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "caption_projection_dim": 4 * 16,
        "joint_attention_dim": LONG_CONTEXT,
        "pooled_projection_dim": 2 * CONTEXT,
        "pos_embed_max_size": 16,
    }


def _sana(config: Config) -> Config:
    return {
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 4 * 16,
        "caption_channels": LONG_CONTEXT,
    }


def _deep_vae(config: Config) -> Config:
    """Six levels, as it has: they decide how many pixels a latent stands for."""
    levels = {"block_out_channels": [8, 8, 8, 16, 16, 32], "layers_per_block": [1] * 6}
    small = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in levels.items()}
    return small | {"attention_head_dim": 8}


SMALLER: dict[str, Callable[[Config], Config]] = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "Gemma2Model": _gemma,
    "AutoencoderKL": _vae,
    "AutoencoderDC": _deep_vae,
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
}


def miniature(name: str, folder: Path) -> Model:
    """The model `name` with small networks and pictures. Writes its configs to `folder`."""
    model = MODELS[name]
    for file in (PACKAGE / "configs" / model.configs).glob("*.json"):
        config: Config = json.loads(file.read_text())
        kind = config.get("_class_name") or config["architectures"][0]
        smaller = SMALLER.get(kind, lambda _: {})
        (folder / file.name).write_text(json.dumps(config | smaller(config)))
    pixels = max(64, min(6 * model.multiple, 128))  # enough rows for eight bits
    return replace(model, configs=str(folder), height=pixels, width=pixels, int8_excluded_shapes=())


def saved(name: str, folder: Path) -> Path:
    """The miniature of `name` in diffusers' format, as a person has a model: the folder that holds its weights."""
    configs, weights = folder / "configs", folder / f"my {name}"
    configs.mkdir()
    model = miniature(name, configs)
    (spec,) = plan_ladder("mine", (Recipe("mine"),), model, Device("cpu", "CPU"), Settings(weights="random")).rungs
    pipe = _from_configs(Build(model, spec))
    if type(pipe.tokenizer).__name__ == "WordTokenizer":  # no library's, so that nobody could load it
        pipe.tokenizer = ByT5Tokenizer()
    pipe.save_pretrained(weights)
    return weights


def hunyuan_dit() -> HunyuanDiT2DModel:
    """A network that no entry has: by default a fused kernel, which turns queries and keys by position."""
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=4,
        text_len_t5=4,
    )
