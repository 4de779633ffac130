"""One process, one measurement: spec.json in, result.json (or failure.json), the image and the log out.

    python -m diffusion_fast.worker RUN_FOLDER

Standard output carries the progress line; everything else that libraries print goes to standard error, the log.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import io
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from diffusion_fast import rows, spool
from diffusion_fast.models import model_of
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, compiles, left_out, same_work
from diffusion_fast.spec import REFERENCE, Failure, Result, RunSpec, calibration_s

JPEG_BYTES = 200_000
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PHASE_CALLS = 3
SHEET_PROMPTS = 40


def main(folder: Path) -> int:
    """Measure what the folder's spec says. Returns the exit code: 0 with a result, 1 with a failure."""
    progress = Progress(folder)
    spec = RunSpec.from_dict(spool.read_json(folder / spool.SPEC))
    try:
        if spec.role == REFERENCE:
            make_reference(spec, folder, progress)
        else:
            result = measure_rung(spec, folder, progress)
            spool.write_json(folder / spool.RESULT, result.to_dict())
            spool.write_text(folder / "result.csv", rows.seed_csv([rows.row(result, None)]))
    except Exception as error:
        traceback.print_exc()
        failure = Failure(
            spec=spec,
            finished_at=_now(),
            reason=_reason(error),
            message=f"{type(error).__name__}: {str(error).strip() or 'no message'}",
            stage=progress.stage,
            elapsed_s=process_age_s(),
            traceback=traceback.format_exc(),
        )
        with suppress(Exception):  # the machine may be what failed
            failure = replace(failure, environment=_environment(spec, folder))
        spool.write_json(folder / spool.FAILURE, failure.to_dict())
        return 1
    return 0


class Progress:
    """Says what is being done: on the line that the person sees, and in a file for when the worker is killed."""

    def __init__(self, folder: Path) -> None:
        self.line = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever prints from here on prints into the log
        self.file = (folder / spool.PROGRESS).open("w")
        self.stage = "starting"

    def __call__(self, stage: str) -> None:
        self.stage = stage
        text = f"{process_age_s():8.1f} s  {stage}"
        print(text, file=self.file, flush=True)
        print(f"[{text.strip()}]", file=sys.stderr, flush=True)
        # On a terminal one line that changes; in a file a line each.
        before, after = ("\r\x1b[2K", "") if self.line.isatty() else ("", "\n")
        print(f"{before}  {text}", file=self.line, end=after, flush=True)


def make_reference(spec: RunSpec, folder: Path, progress: Progress) -> None:
    """Save the images of the plain fp32 pipeline as floats, before they are rounded to bytes.

    With them the same pipeline's images in the rungs' other number formats, and what single steps give in each.
    """
    build, _, _ = _load(spec, progress)
    import numpy
    import torch
    from safetensors.torch import save_file

    from diffusion_fast import onestep, roofline
    from diffusion_fast.pipeline import one_image_at_a_time

    one_image_at_a_time(build)
    progress("rendering the reference")
    with onestep.record(build) as steps:
        _, decoded = _phases(build)
    _refuse_broken(decoded)
    _save_image(_to_pil(decoded), folder)
    spool.write_json(folder / "environment.json", _environment(spec, folder))
    progress("counting operations")
    spool.write_json(folder / spool.REFERENCE_FLOPS, roofline.count_flops(build))
    if spec.accuracy_prompts:
        progress(f"painting {spec.accuracy_prompts} held-out prompts")
        pictures = _painted(build)[1]
        numpy.savez_compressed(folder / spool.REFERENCE_PROMPTS, pictures=pictures)
    images = {"float32": decoded}
    progress("the same in the rungs' number formats")
    formats = {rung.numbers for rung in spool.read_ladder(folder.parent).rungs}
    for numbers in onestep.floors(build, steps, formats):
        progress(f"the image in {numbers}")
        images[numbers] = _phases(build)[1]
    partial = folder / f".{spool.REFERENCE_IMAGE}"
    save_file(images, partial)
    partial.replace(folder / spool.REFERENCE_IMAGE)
    partial = folder / f".{spool.REFERENCE_STEPS}"
    torch.save(steps, partial)
    partial.replace(folder / spool.REFERENCE_STEPS)  # last: it says that the reference is whole


def measure_rung(spec: RunSpec, folder: Path, progress: Progress) -> Result:
    """The measurement itself, kept as soon as it is there. Raises whatever goes wrong before that."""
    cache_state = _cache_state(spec)
    build, applied, import_s = _load(spec, progress)
    from diffusion_fast import measure, roofline
    from diffusion_fast.pipeline import call
    from diffusion_fast.watch import Watch

    load_s = process_age_s() - import_s - calibration_s(applied)

    watch = Watch(spec.device)
    progress("first call" if cache_state == "none" else f"first call, {cache_state} compile cache")
    first_call_s, _ = measure.timed(lambda: call(build), spec.device)
    measure.release_memory(spec.device)  # what loading and compiling left reserved isn't the recipe's
    progress("warming up")
    warmup_s, warmed_up = measure.warm_up(lambda: call(build), spec.device)
    for name, proof in build.proofs.items():
        applied[name] |= proof()

    progress("measuring")
    gc.collect()
    peak = measure.PeakMemory(spec.device)
    with watch:
        samples_s, images = measure.samples(lambda: call(build), spec.device, spec.planned_rounds)
    memory = peak.read()
    median, p10, p90 = measure.quantiles(samples_s)
    result = Result(
        spec=spec,
        finished_at=_now(),
        pipeline_cls=type(build.pipe).__name__,
        ckpt_id=build.model.hub_id if spec.weights == "pretrained" else f"{build.model.name} ({spec.weights})",
        applied=applied,
        import_s=import_s,
        load_s=load_s,
        first_call_s=first_call_s,
        cache_state=cache_state,
        warmup_s=tuple(warmup_s),
        warmed_up=warmed_up,
        samples_s=tuple(samples_s),
        latency_median_s=median,
        latency_p10_s=p10,
        latency_p90_s=p90,
        phases={},
        memory=memory,
        surroundings=watch.account(spec.batch_size * len(samples_s)),
        image_repeats=len({_bytes(batch) for batch in images}) == 1,
    )

    if any(image.convert("RGB").getbbox() is None for batch in images for image in batch):
        _refuse_broken(_phases(build)[1])  # as floats: what isn't finite has become black among the bytes
        raise BrokenImageError("an image is black all over")

    # The measurement is there. What follows may fail, or be killed, without taking it along.
    reference = folder.parents[1] / REFERENCE
    problems = _not_saved(cache_state, applied)
    decoded = None

    def then(stage: str, find: Callable[[], dict[str, Any]]) -> None:
        """Add to the result what is found. A failure costs that alone, and a result that is on disk says it all."""
        nonlocal result
        unfinished = replace(result, problem="; ".join([*problems, f"the worker ended while {stage}"]))
        spool.write_json(folder / spool.RESULT, unfinished.to_dict())
        progress(stage)
        try:
            found = find()
            json.dumps(found, allow_nan=False)  # what can't be written down isn't found
            result = replace(result, **found)
        except BrokenImageError:
            (folder / spool.RESULT).unlink()
            raise
        except Exception as error:
            traceback.print_exc()
            problems.append(f"{stage}: {type(error).__name__}: {error}")

    def describe() -> dict[str, Any]:
        _save_image(images[0], folder)
        weights_gib = sum(roofline.weight_bytes(build).values()) / measure.GIB
        return {"environment": _environment(spec, folder), "memory": memory | {"weights_gib": weights_gib}}

    def split() -> dict[str, Any]:
        nonlocal decoded
        phases, found = _phases(build)
        _refuse_broken(found)
        decoded = found
        return {"phases": phases, "image_repeats": result.image_repeats and _bytes(_to_pil(found)) == _bytes(images[0])}

    then("saving the image", describe)
    then("splitting into phases", split)
    then("comparing", lambda: _fidelity(decoded, spec.numbers, reference / spool.REFERENCE_IMAGE))
    then("asking CLIP", lambda: _clip_score(decoded, spec.prompt))
    if same_work(spec.optimizations):  # else what a step gives depends on those before it
        then("comparing single steps", lambda: _one_step(build, reference / spool.REFERENCE_STEPS))
    then("measuring what the device can do", lambda: _limits(build, reference / spool.REFERENCE_FLOPS, median))
    if spec.profile:
        then("profiling", lambda: _profile(build, folder, reference / spool.REFERENCE_FLOPS, result.limits))
    if spec.accuracy_prompts:
        prompts = reference / spool.REFERENCE_PROMPTS
        then(f"painting {spec.accuracy_prompts} held-out prompts", lambda: _accuracy(build, folder, prompts))
    return replace(result, problem="; ".join(problems))


class BrokenImageError(Exception):
    """What was painted is no image, so what it took to paint it is no measurement."""


def _refuse_broken(decoded: Any) -> None:
    """`decoded`: floats of shape (batch, 3, height, width) in 0..1. On its way to bytes NaN would become black."""
    import torch

    if not torch.isfinite(decoded).all():
        raise BrokenImageError("the image has values that are not finite: NaN or infinity")
    if not (decoded.flatten(1) > 0.5 / 255).any(dim=1).all():
        raise BrokenImageError("the image is black all over")


def _cache_state(spec: RunSpec) -> Literal["none", "cold", "warm", "shared", "saved"]:
    """What the compile cache is before anything was compiled here."""
    if not compiles(spec.optimizations):
        return "none"
    caches = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]), Path(os.environ["TRITON_CACHE_DIR"])
    if not any(cache.is_dir() and any(cache.iterdir()) for cache in caches):
        return "cold"
    if spec.saved_cache and (spec.round, spec.attempt) == (1, 1):
        return "saved"
    return "shared" if os.environ.get("DIFFUSION_FAST_SHARED_CACHE") else "warm"


def _not_saved(cache_state: str, applied: dict[str, dict[str, Any]]) -> list[str]:
    """A clause where a first call from a saved cache had to compile graphs nevertheless."""
    if cache_state != "saved":
        return []
    compiled = next(account for account in applied.values() if "from_cache" in account)
    if compiled["from_cache"] >= compiled["graphs"]:
        return []
    return [f"of {compiled['graphs']} graphs the saved compile cache had only {compiled['from_cache']}"]


def _load(spec: RunSpec, progress: Progress) -> tuple[Build, dict[str, dict[str, Any]], float]:
    """The pipeline as the recipe wants it, each optimization's account, and the seconds that imports took."""
    progress("importing")
    start = time.perf_counter()
    gc.disable()  # what is imported stays: a fifth of the time went into looking for garbage among it
    import diffusers
    import torch

    getattr(diffusers, model_of(spec).pipeline)  # diffusers imports a pipeline's modules when it is asked for
    for module in dict.fromkeys(name for each in spec.optimizations for name in OPTIMIZATIONS[each].imports):
        importlib.import_module(module)
    gc.enable()
    import_s = time.perf_counter() - start
    from diffusion_fast.pipeline import build_pipeline

    torch.set_grad_enabled(False)
    build, applied = build_pipeline(spec, progress)
    if spec.device == "cuda":
        torch.cuda.synchronize()
    return build, applied, import_s


def _phases(build: Build) -> tuple[dict[str, float], Any]:
    """Median seconds of a call's parts, from calls of their own, and the decoded images.

    The images are fp32 on the CPU, shape (batch, 3, height, width), in 0..1. Denoising is what is left of the call
    when the other parts are taken away: the denoiser's steps with the scheduler's.
    """
    import torch

    from diffusion_fast.measure import Stopwatches, now
    from diffusion_fast.pipeline import call

    pipe, clock = build.pipe, functools.partial(now, build.spec.device)
    runs: list[dict[str, float]] = []
    for _ in range(PHASE_CALLS if build.spec.role != REFERENCE else 1):
        watches = Stopwatches(clock)
        with ExitStack() as stack:
            stack.enter_context(watches.on("text_encoding_s", pipe, "encode_prompt"))
            stack.enter_context(watches.on("vae_decode_s", pipe.vae, "decode"))
            stack.enter_context(watches.on("postprocessing_s", pipe.image_processor, "postprocess"))
            start = clock()
            call(build)
            total = clock() - start
        denoising = total - sum(watches.totals.values())
        parts = {"denoising_s": denoising, "denoising_step_s": denoising / build.spec.steps}
        runs.append(watches.totals | parts)
    decoded = watches.first_arguments["postprocessing_s"]
    image = pipe.image_processor.denormalize(decoded).to("cpu", torch.float32).contiguous()  # as its file has to be
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}, image


def _fidelity(image: Any, numbers: str, reference_file: Path) -> dict[str, Any]:
    """How far the image is from the reference, and from that of eager in the same number format."""
    if image is None or not reference_file.is_file():
        return {}
    from safetensors.torch import load_file

    from diffusion_fast.fidelity import compare

    images = load_file(reference_file)
    found = compare(image, images["float32"])
    facts = {"psnr_db": found.psnr_db, "ssim": found.ssim, "identical_to_reference": found.identical}
    if images[numbers].isfinite().all():  # an fp16 that overflows in eager mode is nothing to be compared with
        eager = compare(image, images[numbers])
        facts |= {"psnr_eager_db": eager.psnr_db, "ssim_eager": eager.ssim}
    return facts


def _clip_score(image: Any, prompt: str) -> dict[str, Any]:
    from diffusion_fast.fidelity import clip_score

    return {} if image is None else {"clip_score": clip_score(image, prompt)}


def _one_step(build: Build, steps_file: Path) -> dict[str, Any]:
    if not steps_file.is_file():
        return {}
    import torch

    from diffusion_fast import onestep

    steps = torch.load(steps_file, weights_only=True)
    return {"one_step": onestep.compare(build.spec, onestep.replay(build, steps), steps)}


def _limits(build: Build, flops_file: Path, latency_s: float) -> dict[str, Any]:
    from diffusion_fast import roofline

    if not same_work(build.spec.optimizations):  # the operations that were counted aren't its own
        return {"limits": roofline.ceilings(build)}
    # Without a reference, as in a sweep, a rung counts for itself.
    flops = spool.read_json(flops_file) if flops_file.is_file() else roofline.count_flops(build)
    return {"limits": roofline.limits(build, flops, latency_s)}


def _profile(build: Build, folder: Path, flops_file: Path, limits: dict[str, float]) -> dict[str, Any]:
    from diffusion_fast import profile

    known = flops_file.is_file() and same_work(build.spec.optimizations)
    flops = spool.read_json(flops_file) if known else {}
    flops = {part: counts for part, counts in flops.items() if part not in left_out(build.spec.optimizations)}
    return {"profile": profile.profile(build, folder, flops, limits)}


def _accuracy(build: Build, folder: Path, reference_file: Path) -> dict[str, Any]:
    """Have held-out prompts painted and judged; keep the verdicts, and a sheet of the pictures with them."""
    import numpy

    from diffusion_fast import accuracy
    from diffusion_fast.fidelity import median_psnr_db

    spec = build.spec
    painted, pictures = _painted(build)
    spool.write_json(folder / spool.PROMPTS, {"painted": [each.to_dict() for each in painted]})
    found = accuracy.Accuracy.of(painted)
    title = f"{spec.rung}: {found.right} of {found.prompts} held-out prompts right"
    title += f", of which the first {SHEET_PROMPTS} are here" if found.prompts > SHEET_PROMPTS else ""
    accuracy.sheet(painted[:SHEET_PROMPTS], title).save(folder / spool.PROMPTS_SHEET, quality=90)
    psnr_db = None
    if reference_file.is_file():
        psnr_db = median_psnr_db(pictures, numpy.load(reference_file)["pictures"])
    return {"accuracy": found.to_dict() | ({} if psnr_db is None else {"psnr_db": psnr_db})}


def _painted(build: Build) -> tuple[list[Any], Any]:
    """Held-out prompts, painted and judged, and the pictures as bytes of shape (prompts, height, width, 3)."""
    import numpy

    from diffusion_fast import accuracy, world
    from diffusion_fast.pipeline import call_for

    prompts = world.held_out_prompts(build.spec.accuracy_prompts)
    paint = functools.partial(call_for, build)
    painted = accuracy.paint_and_judge(paint, prompts, batch_size=build.spec.batch_size)
    return painted, numpy.stack([numpy.asarray(each.picture) for each in painted])


def _to_pil(image: Any) -> list[Any]:
    from diffusers.image_processor import VaeImageProcessor

    images: list[Any] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image))
    return images


def _bytes(images: list[Any]) -> bytes:
    return b"".join(image.tobytes() for image in images)


def _save_image(images: list[Any], folder: Path) -> None:
    """The first image of the batch, without loss, and as the best JPEG of at most 200 KB."""
    images[0].save(folder / "image.png")
    for quality in range(95, 0, -5):
        jpeg = io.BytesIO()
        images[0].save(jpeg, "JPEG", quality=quality)
        if jpeg.tell() <= JPEG_BYTES:
            break
    (folder / "image.jpg").write_bytes(jpeg.getvalue())


def _environment(spec: RunSpec, folder: Path) -> dict[str, Any]:
    from diffusion_fast import environment

    facts = environment.describe(spec.device)
    spool.write_json(folder / "environment.json", facts)
    spool.write_text(folder / "requirements.txt", environment.installed())
    return facts


def _reason(error: Exception) -> Literal["exception", "out_of_memory", "broken_image"]:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return "out_of_memory"
    return "broken_image" if isinstance(error, BrokenImageError) else "exception"


def process_age_s() -> float:
    """Seconds since this process started, the interpreter's own start included, to 10 ms (proc(5))."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (prctl(2)): nobody else would after a SIGKILL, and what is
    measured next would share the device with it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1])))
