"""Build the bundled model: a miniature of SDXL in diffusers format, with seeded weights.

    python scripts/make_tiny.py

It has what SDXL has (text_time conditioning, two text encoders, cross-attention at two transformer depths), so that
every optimization applies unchanged. It isn't trained: it paints noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import diffusion_fast
from diffusion_fast.pipeline import byte_tokenizer

FOLDER = Path(diffusion_fast.__file__).parent / "tiny"


def text_config(width: int, layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        projection_dim=width,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def main() -> None:
    torch.manual_seed(0)
    first, second = text_config(64, 2, "quick_gelu"), text_config(96, 2, "gelu")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 3),
        cross_attention_dim=64 + 96,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96 + 6 * 32,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=128,
        force_upcast=False,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=byte_tokenizer(512),
        tokenizer_2=byte_tokenizer(512),
        # SDXL's own, configs/sdxl-base-1.0/scheduler.json
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    pipe.to(torch.float16).save_pretrained(FOLDER, safe_serialization=True)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {size / 2**20:.1f} MiB, {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M in the UNet")


if __name__ == "__main__":
    main()
