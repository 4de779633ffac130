"""Every model, as data, and the check that its weights can be had before anything expensive starts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from diffusion_fast.spec import Model, RunSpec

PACKAGE = Path(__file__).parent
CHECKSUMS = "SHA256SUMS"  # in a folder of weights, as sha256sum writes and checks it
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
HUB_SECONDS = 5.0  # that the hub has to answer in

# Linears that the seed's int8 filter leaves in bf16: it measured them as slower or too lossy. SDXL's own shapes.
SDXL_INT8_EXCLUDED = (
    (1280, 640),
    (1920, 1280),
    (1920, 640),
    (2048, 1280),
    (2048, 2560),
    (2560, 1280),
    (256, 128),
    (2816, 1280),
    (320, 640),
    (512, 1536),
    (512, 256),
    (512, 512),
    (640, 1280),
    (640, 1920),
    (640, 320),
    (640, 5120),
    (640, 640),
    (960, 320),
    (960, 640),
)

SDXL = Model(
    name="sdxl",
    summary="Stable Diffusion XL base 1.0",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    parameters=2_567_463_684,
    height=1024,
    width=1024,
    steps=30,
    guidance_scale=5.0,
    chained_blocks=10,
    hub_id="stabilityai/stable-diffusion-xl-base-1.0",
    configs="sdxl-base-1.0",
    fp16_vae_hub_id="madebyollin/sdxl-vae-fp16-fix",
    fp16_vae_config="vae_fp16_fix",
    tiny_vae_hub_id="madebyollin/taesdxl",
    int8_excluded_shapes=SDXL_INT8_EXCLUDED,
)

SD15 = Model(
    name="sd15",
    summary="Stable Diffusion 1.5",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    parameters=859_520_964,
    height=512,
    width=512,
    steps=30,
    guidance_scale=7.5,
    scheduler="DPMSolverMultistepScheduler",  # as diffusion-fast has it
    left_out=("safety_checker", "feature_extractor", "image_encoder"),
    hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
    configs="sd-v1-5",
    tiny_vae_hub_id="madebyollin/taesd",
)

PIXART_ALPHA = Model(
    name="pixart-alpha",
    summary="PixArt-α, a transformer with a T5 text encoder",
    pipeline="PixArtAlphaPipeline",
    denoiser="transformer",
    parameters=611_349_152,
    height=1024,
    width=1024,
    steps=30,
    guidance_scale=4.5,
    multiple=16,  # its patches are of 2×2 latents
    cacheable_blocks=True,
    lacks=("guidance_that_ends",),  # its call has no callback with the prompt's tensors
    least_steps=2,  # after a single one it takes what schedulers of distilled models give, and others don't
    # It would paint another size than was asked for, and resize; and read the prompt by whether bs4 is installed.
    call_arguments=(("use_resolution_binning", False), ("clean_caption", False)),
    hub_id="PixArt-alpha/PixArt-XL-2-1024-MS",
    configs="pixart-xl-2-1024-ms",
    tiny_vae_hub_id="madebyollin/taesd",
)

# PixArt-α's network, and SDXL's VAE in the place of Stable Diffusion's.
PIXART_SIGMA = replace(
    PIXART_ALPHA,
    name="pixart-sigma",
    summary="PixArt-Σ, PixArt-α's successor with SDXL's VAE",
    pipeline="PixArtSigmaPipeline",
    parameters=610_856_096,
    steps=20,
    hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    configs="pixart-sigma-xl-2-1024-ms",
    fp16_vae_hub_id="madebyollin/sdxl-vae-fp16-fix",
    fp16_vae_config="vae_fp16_fix",
    tiny_vae_hub_id="madebyollin/taesdxl",
)

FLUX_DEV = Model(
    name="flux-dev",
    summary="FLUX.1 dev, whose guidance is distilled into an input",
    pipeline="FluxPipeline",
    denoiser="transformer",
    parameters=11_901_408_320,
    height=1024,
    width=1024,
    steps=28,
    guidance_scale=3.5,
    guidance="embedded",
    multiple=16,
    cacheable_blocks=True,
    written_out=True,
    lacks=("plain_attention",),  # its processor turns queries and keys by position
    large=True,
    hub_id="black-forest-labs/FLUX.1-dev",
    configs="flux1-dev",
    tiny_vae_hub_id="madebyollin/taef1",
)

FLUX_SCHNELL = replace(
    FLUX_DEV,
    name="flux-schnell",
    summary="FLUX.1 schnell, distilled to four steps without guidance",
    parameters=11_891_178_560,
    steps=4,
    guidance_scale=0.0,
    guidance="none",
    call_arguments=(("max_sequence_length", 256),),  # the most that it was trained for
    hub_id="black-forest-labs/FLUX.1-schnell",
    configs="flux1-schnell",
)

SD35_MEDIUM = Model(
    name="sd3.5-medium",
    summary="Stable Diffusion 3.5 medium, a transformer with three text encoders",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    parameters=2_243_171_520,
    height=1024,
    width=1024,
    steps=40,
    guidance_scale=4.5,
    multiple=16,
    written_out=True,
    # diffusers' processor for fused projections knows neither its second attention nor the norms of queries and keys.
    lacks=("fusable_projections", "plain_attention"),
    hub_id="stabilityai/stable-diffusion-3.5-medium",
    configs="sd3.5-medium",
    tiny_vae_hub_id="madebyollin/taesd3",
)

SANA = Model(
    name="sana",
    summary="Sana 1.6B, linear attention on latents of 32×32 pixels each",
    pipeline="SanaPipeline",
    denoiser="transformer",
    parameters=1_604_462_752,
    height=1024,
    width=1024,
    steps=20,
    guidance_scale=4.5,
    multiple=32,
    written_out=True,
    call_arguments=(("use_resolution_binning", False),),  # as PixArt's
    # Its callback isn't given the prompt's mask, which would stay as it is for two rows.
    lacks=(
        *("fusable_projections", "plain_attention", "guidance_that_ends"),
        *("group_norms", "small_1x1_convolutions", "wide_vae_heads"),
    ),
    hub_id="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    configs="sana-1600m-1024px",
)

MODELS = {
    model.name: model
    for model in (
        Model(
            name="tiny",
            summary="the bundled miniature of SDXL: every optimization applies, runs anywhere",
            prompt="a large red circle above a small blue square on a white background",
            small_world=True,
            pipeline="StableDiffusionXLPipeline",
            denoiser="unet",
            parameters=4_346_244,
            height=128,
            width=128,
            steps=30,
            guidance_scale=2.0,
            chained_blocks=2,
            lacks=("wide_vae_heads",),
            embedded="tiny",
        ),
        SDXL,
        # What eight bits lose on random weights says little of trained ones, unless these have outliers, too.
        replace(
            SDXL, name="sdxl-outliers", summary="SDXL with 1% of its transformers' channels scaled by 20", outliers=True
        ),
        replace(
            SDXL,
            name="ssd-1b",
            summary="SSD-1B, half of SDXL",
            parameters=1_331_334_404,
            hub_id="segmind/SSD-1B",
            configs="ssd-1b",
        ),
        SD15,
        PIXART_ALPHA,
        PIXART_SIGMA,
        SD35_MEDIUM,
        FLUX_DEV,
        FLUX_SCHNELL,
        SANA,
    )
}


def model_of(spec: RunSpec) -> Model:
    """The model that a spec is about."""
    return spec.unlisted or MODELS[spec.model]


class WeightsUnreachableError(Exception):
    """The weights exist elsewhere and cannot be had from here."""

    def __init__(self, hub_id: str, error: Exception, listed: bool = True) -> None:
        instead = (
            "--weights random measures the same latency and memory, and --weights FOLDER loads a local copy."
            if listed
            else "--model FOLDER loads a local copy."
        )
        kind = type(error).__name__
        terms = "accept their terms on the hub and set HF_TOKEN, or " if kind == "GatedRepoError" else ""
        super().__init__(f"The weights of {hub_id} can't be reached ({kind}): {terms}{instead}")


def check_weights(model: Model, weights: str, parts: Iterable[str] = ()) -> None:
    """Make sure, in seconds and without torch, that `weights` can be loaded, and `parts`: hub ids of single networks.

    Raises ValueError when the choice makes no sense, WeightsUnreachableError when the hub doesn't answer within 5 s.
    """
    others = "embedded or a folder" if model.embedded else "a folder"
    if weights == "embedded":
        if not model.embedded:
            raise ValueError(
                f"{model.name} doesn't come with the package: use --weights pretrained, random or a folder."
            )
        verify(PACKAGE / model.embedded, required=True)
    elif weights == "random":
        if not model.configs:
            raise ValueError(f"{model.name} can't be built from random weights: use --weights {others}.")
    elif weights == "pretrained":
        if not model.hub_id:
            raise ValueError(f"{model.name} has no weights on the hub: use --weights {others}.")
        check_hub(model.hub_id, f"{model.denoiser}/{WEIGHTS_FILE}", listed=model.name in MODELS)
    else:
        _check_folder(model, Path(weights))
    if weights != "random":
        for part in parts:
            check_hub(part, WEIGHTS_FILE)


def _check_folder(model: Model, folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"--weights {folder} is neither embedded, pretrained, random nor a folder that holds a model_index.json."
        )
    try:
        found = json.loads(index.read_text()).get("_class_name")
    except ValueError as error:
        raise ValueError(f"{index} isn't JSON: {error}.") from error
    if found != model.pipeline:
        raise ValueError(f"--weights {folder} holds a {found}, and {model.name} is a {model.pipeline}.")
    if not any(folder.glob("*/*.safetensors")):
        raise ValueError(f"--weights {folder} holds no .safetensors files, and other formats are not loaded.")
    verify(folder)


def verify(folder: Path, required: bool = False) -> None:
    """Check a folder's weights against its SHA256SUMS. Without one nothing is checked, unless it is `required`.

    Raises ValueError with the name of a file that isn't what it was, is gone, or isn't listed.
    """
    recorded = folder / CHECKSUMS
    if not recorded.is_file():
        if required:
            raise ValueError(f"{recorded} is missing: the weights beside it can't be verified.")
        return
    listed = {
        name: expected for expected, _, name in (line.partition("  ") for line in recorded.read_text().splitlines())
    }
    for path in sorted(folder.glob("*/*.safetensors")):
        if str(path.relative_to(folder)) not in listed:
            raise ValueError(f"{path} is not listed in {CHECKSUMS}.")
    for name, expected in listed.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, and {CHECKSUMS} lists it.")
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{folder / name} is not what {CHECKSUMS} records: it was altered or cut short.")


def check_hub(hub_id: str, file: str, listed: bool = True) -> None:
    """Make sure that the hub gives what it has, or its local cache has the file.

    Raises WeightsUnreachableError where the hub has nothing for us, or doesn't answer within 5 s.
    """
    from huggingface_hub import try_to_load_from_cache

    files = file, f"{file}.index.json"  # large weights are several files, and an index of them
    if any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files):
        return
    try:
        _ask_hub(hub_id)
    except Exception as error:  # the hub client's own, its HTTP library's, the operating system's
        raise WeightsUnreachableError(hub_id, error, listed) from error


def _ask_hub(hub_id: str) -> None:
    """Raises what the hub's client does where there is no such repository, or it isn't for us."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    end, hub = time.monotonic() + HUB_SECONDS, HfApi()
    if hub.model_info(hub_id, timeout=HUB_SECONDS).gated is False:
        return
    # The hub tells everybody about gated weights, and gives them to some. `hub.auth_check` asks the same, and would
    # wait for ever for an answer.
    address, left = f"{hub.endpoint}/api/models/{hub_id}/auth-check", max(end - time.monotonic(), 0.1)
    hf_raise_for_status(get_session().get(address, headers=build_hf_headers(), timeout=left))
