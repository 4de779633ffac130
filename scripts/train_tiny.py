"""Train the bundled model on scenes that are drawn: its VAE, then its text encoders and its UNet together.

    python scripts/train_tiny.py --output training          # one H100: within 20 minutes
    python scripts/train_tiny.py --output training --smoke  # a few steps of each, on a CPU: that it runs

Run again after it was stopped, it goes on from its checkpoint. It leaves in the folder: model/ (the pipeline as
diffusers saves it, float16), metrics.jsonl (losses and accuracies by step), samples/, evaluation.json and a sheet of
held-out prompts with the judge's verdicts, and training.json, by which `diffusion-fast sync` records the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from tokenizers import AddedToken
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_fast import accuracy, environment, spool, world
from diffusion_fast.draw import Layout, arrange, draw
from diffusion_fast.judge import judge
from diffusion_fast.models import CHECKSUMS, MODELS
from diffusion_fast.pipeline import byte_tokenizer, no_tf32

TINY = MODELS["tiny"]
GUIDANCES = (1.5, 2.0, 3.0, 5.0, 7.0)  # tried at the end: a model has one at which it paints best


@dataclass(frozen=True)
class Plan:
    """Everything that decides a training."""

    seed: int = 0
    scenes: int = 200_000
    vae_steps: int = 10_000
    vae_batch: int = 64
    vae_rate: float = 1e-3
    kl_weight: float = 1e-6
    steps: int = 36_000
    batch: int = 512
    rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 500
    unconditional: float = 0.1  # of the captions are dropped, for guidance
    ema: float = 0.999
    checkpoint_every: int = 2_000
    sample_every: int = 5_000
    sample_prompts: int = 100
    prompts: int = 500


SMOKE = Plan(
    scenes=16,
    vae_steps=4,
    vae_batch=4,
    steps=4,
    batch=8,
    warmup=2,
    checkpoint_every=2,
    sample_every=2,
    sample_prompts=2,
    prompts=2,
)


def tokenizer() -> CLIPTokenizer:
    """CLIP's with a vocabulary of single bytes, in which what it doesn't know is spelled, and the world's words."""
    found = byte_tokenizer(512)
    phrases = [phrase for several in world.PHRASES.values() for phrase in several]
    names = [*world.SHAPES, *world.COLOURS, *world.BACKGROUNDS, *world.SIZES, "a", "an"]
    fixed = [re.sub(r"{\w+}|,", "", template) for template in (*world.ONE, *world.TWO)]
    words = sorted({word for text in (*names, *phrases, *fixed) for word in text.split()})
    found.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return found


def new_pipeline(plan: Plan) -> StableDiffusionXLPipeline:
    """The model with seeded random weights: SDXL's structure, of a size that two CPU cores run in half a second."""
    torch.manual_seed(plan.seed)
    words = tokenizer()

    def text_config(width: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,  # the last but one is what the UNet attends to
            num_attention_heads=width // 32,
            projection_dim=width,
            hidden_act=activation,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )

    first, second = text_config(64, "quick_gelu"), text_config(64, "gelu")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        # Attention where it is cheap: 8x8 pixels at depth 1, and 4x4 at depth 2 in the middle.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 3, 4),  # SDXL's configs call the number of heads so
        cross_attention_dim=64 + 64,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=64 + 6 * 32,
        use_linear_projection=True,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,  # with a group a channel, a norm would take a picture's colours out of it
        sample_size=world.CANVAS,
        scaling_factor=1.0,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        force_upcast=False,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=words,
        tokenizer_2=tokenizer(),
        # SDXL's betas leave some of the picture in the noisiest step, its mean colour above all. Rescaled they leave
        # nothing (https://arxiv.org/abs/2305.08891): here backgrounds are flat, and must come from the caption.
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        add_watermarker=False,
    )


class Log:
    """metrics.jsonl: a line a value, with its step. What is logged again after a restart counts the last time."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / spool.TRAINING_METRICS).open("a")

    def __call__(self, step: int, **values: float) -> None:
        for name, value in values.items():
            print(json.dumps({"step": step, "name": name, "value": value}), file=self.file, flush=True)
        print(f"{step:7}  " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()), flush=True)


class Checkpoint:
    """One file, replaced whole. Every stage has its name in it, with its state."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / "checkpoint.pt"
        self.begin = time.monotonic()
        new = {"id": f"{datetime.now(UTC):%Y%m%d-%H%M%S}-train-tiny", "identity": identity, "seconds": 0.0}
        self.stages: dict[str, Any] = torch.load(self.path, map_location="cpu") if self.path.is_file() else new
        if self.stages["identity"] != identity:
            raise SystemExit(f"{folder} holds a checkpoint of another plan, model or world: take another --output.")
        self.before = float(self.stages["seconds"])

    def seconds(self) -> float:
        """How long it has trained, what came before a restart included."""
        return self.before + time.monotonic() - self.begin

    def save(self, stage: str, **state: Any) -> None:
        self.stages |= {stage: state, "seconds": self.seconds()}
        partial = self.path.with_suffix(".partial")
        torch.save(self.stages, partial)
        partial.replace(self.path)


class Data:
    """Scenes, their captions' tokens and where their objects are: all drawn once, from the seed, on the device."""

    def __init__(self, plan: Plan, words: CLIPTokenizer, device: str) -> None:
        random, generator = Random(plan.seed), torch.Generator().manual_seed(plan.seed)
        scenes = [world.random_scene(random) for _ in range(plan.scenes)]
        captions = [world.caption(scene, random) for scene in scenes]
        self.layout: Layout = arrange(scenes, generator).to(device)
        self.tokens = tokens(words, captions).to(device)

    def pictures(self, which: torch.Tensor) -> torch.Tensor:
        """(n, 3, 128, 128) in -1..1, as the VAE wants them."""
        return draw(self.layout[which]) * 2 - 1


def identity(plan: Plan, pipe: StableDiffusionXLPipeline, data: Data) -> str:
    """A hash of everything that two trainings must share for one to go on with the other's checkpoint."""
    configs = {name: str(part.config) for name, part in pipe.components.items() if hasattr(part, "config")}
    known = json.dumps([asdict(plan), configs], sort_keys=True).encode()
    return hashlib.sha256(known + data.tokens.cpu().numpy().tobytes()).hexdigest()


def tokens(words: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    ids: torch.Tensor = words(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return ids


def rate(plan_rate: float, step: int, steps: int, warmup: int) -> float:
    """A linear warm-up, then a cosine down to nothing."""
    return plan_rate * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


class Step:
    """A whole step: the loss, its gradients, their clipping, the optimizer.

    On a GPU it is recorded as one CUDA graph after its first steps: launched one by one, the step's thousands of
    kernels take two to three times as long as they run.

    loss_of: inputs → (the loss, more values to log), scalars; it must not wait for the GPU.
    """

    EAGER = 3  # steps before the recording, in which kernels are compiled and chosen, and states allocated

    def __init__(self, loss_of: Callable[..., tuple[torch.Tensor, ...]], optimizer: torch.optim.Optimizer) -> None:
        self.loss_of, self.optimizer = loss_of, optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = self.parameters[0].device
        self.rate = torch.zeros((), device=self.device)  # where the recorded step reads it
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        self.taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # What is recorded must not have run on the default stream, or its gradients would be added up there.
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.values: tuple[torch.Tensor, ...] = ()

    def __call__(self, rate: float, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take a step at this learning rate. Returns what `loss_of` did, to be read before the next step."""
        self.rate.fill_(rate)
        self.taken += 1
        if self.stream is None:
            return self.descend(*inputs)
        if self.graph is None:
            self.inputs = tuple(each.clone() for each in inputs)
            self.stream.wait_stream(torch.cuda.current_stream())
            if self.taken <= self.EAGER:
                with torch.cuda.stream(self.stream):
                    self.values = self.descend(*self.inputs)
                torch.cuda.current_stream().wait_stream(self.stream)
                return self.values
            self.optimizer.zero_grad(set_to_none=True)  # they are the graph's own from here on
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.values = self.descend(*self.inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.values

    def descend(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.optimizer.zero_grad(set_to_none=True)
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False):
            values = self.loss_of(*inputs)
        values[0].backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return tuple(value.detach() for value in values)


def adam(parameters: Iterable[torch.nn.Parameter], device: str, weight_decay: float) -> torch.optim.AdamW:
    # Its learning rate is a tensor (Step), which CUDA graphs allow where it is `capturable`.
    return torch.optim.AdamW(
        parameters,
        torch.zeros((), device=device),
        betas=(0.9, 0.99),
        weight_decay=weight_decay,
        fused=True,
        capturable=device == "cuda",
    )


def train_vae(pipe: StableDiffusionXLPipeline, data: Data, plan: Plan, log: Log, checkpoint: Checkpoint) -> None:
    """Teach the VAE to reproduce scenes, then have its latents centred and scaled to one by its config."""
    vae, device = pipe.vae, pipe.device.type
    generator = torch.Generator(device).manual_seed(plan.seed + 1)
    optimizer = adam(vae.parameters(), device, weight_decay=0.0)
    start = restore(checkpoint, "vae", vae, optimizer, generator)
    vae.train().to(memory_format=torch.channels_last)

    def error_of(pictures: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spread = vae.encode(pictures).latent_dist
        again = vae.decode(spread.mean + spread.std * noise).sample
        wrong = functional.l1_loss(again.float(), pictures) + functional.mse_loss(again.float(), pictures)
        kl = spread.kl().mean()
        return wrong + plan.kl_weight * kl, wrong, kl

    error = torch.compile(error_of) if device == "cuda" else error_of
    take = Step(lambda which, noise: error(data.pictures(which), noise), optimizer)
    for step in range(start, plan.vae_steps):
        which = torch.randint(plan.scenes, (plan.vae_batch,), generator=generator, device=device)
        noise = torch.randn(plan.vae_batch, 4, 16, 16, generator=generator, device=device)
        _, wrong, kl = take(rate(plan.vae_rate, step, plan.vae_steps, plan.warmup), which, noise)
        if step % 100 == 0 or step == plan.vae_steps - 1:
            log(step, vae_loss=wrong.item(), vae_kl=kl.item(), trained_s=checkpoint.seconds())
        if (step + 1) % plan.checkpoint_every == 0 or step == plan.vae_steps - 1:
            checkpoint.save("vae", **state_of(step + 1, vae, optimizer, generator))
    vae.eval().requires_grad_(False)
    sample = encode(vae, data, torch.arange(min(plan.scenes, 2048), device=device))
    vae.register_to_config(
        latents_mean=sample.mean((0, 2, 3)).tolist(), latents_std=sample.std((0, 2, 3)).tolist(), scaling_factor=1.0
    )
    log(plan.vae_steps, vae_right=reproduced(vae, plan))


@torch.no_grad()
def reproduced(vae: AutoencoderKL, plan: Plan) -> float:
    """The share of scenes that the judge still finds right after the VAE: no prompt is painted better than that."""
    random = Random(plan.seed + 1)
    scenes = [world.random_scene(random, unseen=True) for _ in range(plan.prompts)]
    pictures = draw(arrange(scenes, torch.Generator().manual_seed(plan.seed + 1)).to(vae.device)) * 2 - 1
    again = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(50)])
    pixels = VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(again))
    return sum(judge(each, scene).right for each, scene in zip(pixels, scenes, strict=True)) / len(scenes)


def train_denoiser(
    pipe: StableDiffusionXLPipeline, data: Data, plan: Plan, log: Log, checkpoint: Checkpoint, folder: Path
) -> None:
    """Teach the text encoders and the UNet together, by the error of the velocity; the pipeline gets their average."""
    device = pipe.unet.device.type
    learning = torch.nn.ModuleDict(
        {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    ).train()
    average = AveragedModel(learning, multi_avg_fn=get_ema_multi_avg_fn(plan.ema)).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(plan.seed + 2)
    optimizer = adam(learning.parameters(), device, plan.weight_decay)
    start = restore(checkpoint, "denoiser", learning, optimizer, generator)
    if start:
        average.load_state_dict(checkpoint.stages["denoiser"]["average"])

    latents = encode(pipe.vae, data, torch.arange(plan.scenes, device=device))
    mean, std = (
        torch.tensor(values, device=device).view(1, 4, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    latents = (latents - mean) / std
    signal = pipe.scheduler.alphas_cumprod.to(device)
    size = torch.tensor([world.CANVAS, world.CANVAS, 0, 0, world.CANVAS, world.CANVAS], device=device)

    def error_of(
        clean: torch.Tensor, ids: torch.Tensor, said: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        context, pooled = encode_text(learning["text_encoder"], learning["text_encoder_2"], ids)
        # SDXL's pipeline takes zeros for what isn't said.
        context, pooled = context * said[:, None, None], pooled * said[:, None]
        seen, wanted = noised(clean, noise, signal[timestep])
        velocity = learning["unet"](
            seen,
            timestep,
            encoder_hidden_states=context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": size.expand(len(clean), -1)},
            return_dict=False,
        )[0]
        return (functional.mse_loss(velocity.float(), wanted),)

    # The encoders hook their outputs at their first call, and that can't be traced.
    encode_text(learning["text_encoder"], learning["text_encoder_2"], data.tokens[:1])
    error = torch.compile(error_of) if device == "cuda" else error_of
    take = Step(
        lambda which, said, timestep, noise: error(latents[which], data.tokens[which], said, timestep, noise),
        optimizer,
    )
    for step in range(start, plan.steps):
        which = torch.randint(plan.scenes, (plan.batch,), generator=generator, device=device)
        said = torch.rand(plan.batch, generator=generator, device=device) >= plan.unconditional
        timestep = torch.randint(len(signal), (plan.batch,), generator=generator, device=device)
        noise = torch.randn(plan.batch, *latents.shape[1:], generator=generator, device=device)
        (loss,) = take(rate(plan.rate, step, plan.steps, plan.warmup), which, said, timestep, noise)
        average.update_parameters(learning)
        last = step == plan.steps - 1
        if step % 100 == 0 or last:
            log(step, loss=loss.item(), trained_s=checkpoint.seconds())
        if (step + 1) % plan.checkpoint_every == 0 or last:
            state = state_of(step + 1, learning, optimizer, generator)
            checkpoint.save("denoiser", **state, average=average.state_dict())
        if (step + 1) % plan.sample_every == 0 and not last:
            painter = StableDiffusionXLPipeline(
                **(pipe.components | dict(average.module.items())), add_watermarker=False
            )
            painted = paint(painter, world.held_out_prompts(plan.sample_prompts))
            log(step + 1, prompt_accuracy=accuracy.Accuracy.of(painted).accuracy)
            accuracy.sheet(painted[:16], f"step {step + 1}").save(
                folder / spool.TRAINING_SAMPLES / f"step-{step + 1:06}.jpg"
            )
    for name, part in average.module.items():
        getattr(pipe, name).load_state_dict(part.state_dict())
    learning.eval().requires_grad_(False)


CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
---
# tiny: a miniature of SDXL that paints a small world

A `StableDiffusionXLPipeline` of {size:.1f} M parameters that comes with diffusion_fast, so that optimizations of SDXL
can be measured anywhere, with pictures on which one can see what they do.

**Training.** {training}

**Data.** Scenes drawn by diffusion_fast's `draw.py`, with captions from its `world.py`, 128×128 pixels: one object, or
two of which one is above, below, left of or right of the other.

- shapes: {shapes}
- colours: {colours}
- sizes: {sizes}
- backgrounds: {backgrounds}

{unseen} of the {things} objects (shape, colour and size) are held out of the training, and prompts are judged on scenes
with one of these. No picture and no text of anybody else's was used.

**Figures.** {figures}

**Limits.** It knows nothing else: any other prompt paints something, without meaning. Pictures of another size than
128×128 were never trained.

**Licence.** Apache-2.0, as diffusion_fast itself.
"""


def save(pipe: StableDiffusionXLPipeline, folder: Path) -> None:
    """The pipeline in float16, and the checksums that are verified whenever it is loaded."""
    pipe.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}"
        for path in sorted(folder.glob("*/*.safetensors"))
    ]
    spool.write_text(folder / CHECKSUMS, "\n".join(lines) + "\n")


def card(pipe: StableDiffusionXLPipeline, training: str, figures: str) -> str:
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return CARD.format(
        size=sum(parameter.numel() for part in networks for parameter in part.parameters()) / 1e6,
        training=training,
        figures=figures,
        shapes=", ".join(world.SHAPES),
        colours=", ".join(world.COLOURS),
        sizes=", ".join(world.SIZES),
        backgrounds=", ".join(world.BACKGROUNDS),
        unseen=len(world.UNSEEN),
        things=len(world.THINGS),
    )


def noised(clean: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet sees and the velocity it shall predict, where `signal` (n) is what is left of the clean variance.

    https://arxiv.org/abs/2202.00512, appendix D
    """
    a, b = (amount.sqrt().view(-1, 1, 1, 1) for amount in (signal, 1 - signal))
    return a * clean + b * noise, a * noise - b * clean


def encode_text(first: Any, second: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What SDXL's pipeline makes of token ids: (n, 77, 128) to attend to, and the second encoder's (n, 64) for all."""
    one, two = first(ids, output_hidden_states=True), second(ids, output_hidden_states=True)
    return torch.cat((one.hidden_states[-2], two.hidden_states[-2]), -1), two.text_embeds


def paint(
    pipe: StableDiffusionXLPipeline, prompts: tuple[str, ...], guidance: float = TINY.guidance_scale
) -> list[accuracy.Painted]:
    pipe.set_progress_bar_config(disable=True)

    def call(texts: list[str], seeds: list[int]) -> list[Any]:
        noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        latents = torch.stack(noise).to(pipe.device, pipe.unet.dtype)
        images: list[Any] = pipe(
            texts,
            num_inference_steps=TINY.steps,
            guidance_scale=guidance,
            height=TINY.height,
            width=TINY.width,
            latents=latents,
        ).images
        return images

    return accuracy.paint_and_judge(call, prompts, min(50, len(prompts)))


def state_of(step: int, model: torch.nn.Module, optimizer: Any, generator: torch.Generator) -> dict[str, Any]:
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    return {"step": step, **states}


def restore(
    checkpoint: Checkpoint, stage: str, model: torch.nn.Module, optimizer: Any, generator: torch.Generator
) -> int:
    """The step to go on from."""
    if stage not in checkpoint.stages:
        return 0
    state = checkpoint.stages[stage]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return int(state["step"])


@torch.no_grad()
def encode(vae: AutoencoderKL, data: Data, which: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(data.pictures(part)).latent_dist.mean for part in which.split(256)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, on whatever there is")
    arguments = parser.parse_args()
    train(SMOKE if arguments.smoke else Plan(), arguments.output)


def train(plan: Plan, folder: Path) -> accuracy.Accuracy:
    """The whole training, or what is left of it. Returns how many of the held-out prompts are painted right."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (folder / spool.TRAINING_SAMPLES).mkdir(parents=True, exist_ok=True)
    pipe = new_pipeline(plan).to(device)
    data = Data(plan, pipe.tokenizer, device)
    checkpoint = Checkpoint(folder, identity(plan, pipe, data))
    log = Log(folder)
    torch.set_float32_matmul_precision("high")
    train_vae(pipe, data, plan, log, checkpoint)
    train_denoiser(pipe, data, plan, log, checkpoint, folder)
    save(pipe, folder / "model")

    # What is shipped is judged: the float16 weights, in fp32.
    no_tf32()
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "model", dtype=torch.float32).to(device)
    others = world.held_out_prompts(2 * plan.prompts)[plan.prompts :]  # a scale chosen by what is judged would flatter
    for guidance in GUIDANCES:
        some = accuracy.Accuracy.of(paint(pipe, others, guidance))
        log(plan.steps, **{f"prompt_accuracy_guidance_{guidance:g}": some.accuracy})
    painted = paint(pipe, world.held_out_prompts(plan.prompts))
    result = accuracy.Accuracy.of(painted)
    log(plan.steps, prompt_accuracy=result.accuracy)
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    training = (
        f"`scripts/train_tiny.py`: {plan.vae_steps} steps of the VAE, {plan.steps} of the text encoders and the UNet, "
        f"{checkpoint.seconds():.0f} s on {where}, from the seed {plan.seed}."
    )
    figures = (
        f"In fp32, with {TINY.steps} steps and a guidance scale of {TINY.guidance_scale:g}, {result.right} of "
        f"{result.prompts} held-out prompts are painted wholly right ({result.low:.1%} to {result.high:.1%} at 95%)."
    )
    spool.write_text(folder / "model" / "README.md", card(pipe, training, figures))
    spool.write_json(folder / "evaluation.json", result.to_dict() | {"painted": [each.to_dict() for each in painted]})
    accuracy.sheet(painted[:25], "25 held-out prompts", columns=5).save(folder / "sheet.jpg", quality=90)
    facts = {
        "id": checkpoint.stages["id"],
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": checkpoint.seconds(),
        "plan": asdict(plan),
        "accuracy": result.to_dict(),
        "environment": environment.describe(device),
    }
    spool.write_json(folder / spool.TRAINING, facts)  # last: it says that the folder is whole
    return result


if __name__ == "__main__":
    main()
