"""Every model in a few hundred kilobytes: its own configs, each number of them made small."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_fast.models import MODELS, PACKAGE
from diffusion_fast.optimizations import Build
from diffusion_fast.pipeline import _from_configs
from diffusion_fast.plan import Device, Settings, plan_ladder
from diffusion_fast.spec import Model, Recipe

NAMES = ("sdxl", "ssd-1b", "sd15", "pixart-alpha")
CONTEXT = 32  # numbers of a token, of each text encoder

Config = dict[str, Any]


def _clip(config: Config) -> Config:
    small = {"hidden_size": CONTEXT, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return small | {"projection_dim": CONTEXT}


def _t5(config: Config) -> Config:
    return {"d_model": CONTEXT, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 512}


def _vae(config: Config) -> Config:
    return {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8, "layers_per_block": 1}


def _unet(config: Config) -> Config:
    levels = len(config["block_out_channels"])
    two_encoders = config.get("addition_embed_type") == "text_time"
    small: Config = {
        "block_out_channels": [16 * (level + 1) for level in range(levels)],
        "attention_head_dim": [2] * levels if isinstance(config["attention_head_dim"], list) else 4,
        "norm_num_groups": 8,
        "cross_attention_dim": 2 * CONTEXT if two_encoders else CONTEXT,
    }
    if two_encoders:
        small["projection_class_embeddings_input_dim"] = CONTEXT + 6 * config["addition_time_embed_dim"]
    return small


def _pixart(config: Config) -> Config:
    heads, dim = 4, 12
    return {
        "num_layers": 2,
        "num_attention_heads": heads,
        "attention_head_dim": dim,
        "cross_attention_dim": heads * dim,
        "caption_channels": CONTEXT,
    }


SMALLER: dict[str, Callable[[Config], Config]] = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "AutoencoderKL": _vae,
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
}


def miniature(name: str, folder: Path) -> Model:
    """The model `name` with small networks, at 64×64 pixels. Writes its configs to `folder`."""
    model = MODELS[name]
    for file in (PACKAGE / "configs" / model.configs).glob("*.json"):
        config: Config = json.loads(file.read_text())
        kind = config.get("_class_name") or config["architectures"][0]
        smaller = SMALLER.get(kind, lambda _: {})
        (folder / file.name).write_text(json.dumps(config | smaller(config)))
    return replace(model, configs=str(folder), height=64, width=64, int8_excluded_shapes=())


def saved(name: str, folder: Path) -> Path:
    """The miniature of `name` in diffusers' format, as a person has a model: the folder that holds its weights."""
    configs, weights = folder / "configs", folder / f"my {name}"
    configs.mkdir()
    model = miniature(name, configs)
    (spec,) = plan_ladder("mine", (Recipe("mine"),), model, Device("cpu", "CPU"), Settings(weights="random")).rungs
    _from_configs(Build(model, spec)).save_pretrained(weights)
    return weights
