"""One flat, typed row a rung: the names that people query by, the same in MLflow, in a DataFrame and in CSV files."""

from __future__ import annotations

import csv
import hashlib
import io
from typing import Any

from diffusion_fast.optimizations import compiles, left_out
from diffusion_fast.spec import SWEEP, Failure, Ladder, Outcome, Result

# MLflow keeps parameters and tags as strings: these are the columns that come back as numbers.
INTEGERS = ("steps", "batch_size", "height", "width", "seed", "round", "planned_rounds", "attempt")
FLOATS = ("guidance_scale",)
FLAGS = ("warmed_up", "image_repeats", "identical_to_reference", "fidelity_ok")
SERIES = (
    "latency_sample_s",
    "one_step_error",
    "one_step_floor",
    "one_step_to_eager",
)  # metrics of many values, by repeat or by step
# diffusion-fast's own words for what it quantizes to.
SEED_QUANT = {
    "int8_dynamic": "int8dynamic",
    "int8_weight_only": "int8weightonly",
    "int4_weight_only": "int4weightonly",
}
FIDELITY = ("psnr_db", "ssim", "psnr_eager_db", "ssim_eager", "clip_score")
ONE_STEP = ("error", "floor", "to_eager")  # of the reference, eager's own, and of eager in the same number format
METRICS = (
    "latency_median_s",
    "latency_p10_s",
    "latency_p90_s",
    "s_per_image",
    "images_per_s",
    "speedup",
    "text_encoding_s",
    "denoising_s",
    "denoising_step_s",
    "vae_decode_s",
    "postprocessing_s",
    "peak_memory_gib",
    "weights_gib",
    "tflop",
    "mfu",
    "floor_s",
    "floor_percent",
    *FIDELITY,
    "one_step_error_max",
    "one_step_floor_max",
    "one_step_to_eager_max",
    "one_step_of_allowed_max",
    "prompt_accuracy",
    "prompt_accuracy_low",
    "prompt_accuracy_high",
    "prompt_count",
    "prompt_psnr_db",
    "load_s",
    "import_s",
    "first_call_s",
    "first_image_s",
)
OTHERS = 0.1  # of all cores: what a tenth of a CPU did beside the measurement is worth a warning
# What must be the same for two latencies to make a ratio: not the host's name, not which of its GPUs.
MACHINE = ("gpu", "driver", "cpu")
MACHINE_WITHOUT_GPU = ("cpu", "threads", "affinity")
VERSIONS = ("python", "torch", "cuda", "cudnn", "triton", "diffusers", "transformers", "torchao", "accelerate", "numpy")
# The columns that a DataFrame of runs always has, before those that depend on the device and the recipe.
COLUMNS = (
    *("ladder_id", "ladder", "rung", "status", "model", "weights", "recipe", "optimizations", "dtype", "device"),
    *("device_name", "compile_mode", "prompt", *METRICS, *FLOATS, *INTEGERS, *FLAGS),
    *("cache_state", "saved_cache", "speedup_base", "tag", "reason", "error", "problem"),
    *("measurement_id", "conditions", "machine", "versions", "flags", "environment_hash", "commit"),
)


def parameters(outcome: Outcome) -> dict[str, Any]:
    """What decided the measurement."""
    spec = outcome.spec
    return {
        "model": spec.model,
        "weights": spec.weights,
        "recipe": spec.recipe,
        "optimizations": ",".join(spec.optimizations),
        "dtype": spec.dtype,
        "device": spec.device,
        "device_name": outcome.environment.get("gpu") or outcome.environment.get("cpu") or "",
        "compile_mode": spec.compile_mode if compiles(spec.optimizations) else "",
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "height": spec.height,
        "width": spec.width,
        "guidance_scale": spec.guidance_scale,
        "seed": spec.seed,
        "prompt": spec.prompt,
        **({"kept_layers": ",".join(spec.kept)} if spec.kept else {}),
    }


def metrics(outcome: Outcome, base: Result | None) -> dict[str, float]:
    """What was measured. `speedup` is against `base`, the ladder's first rung in the same round."""
    if isinstance(outcome, Failure):
        return {"elapsed_s": outcome.elapsed_s}
    found = {
        "latency_median_s": outcome.latency_median_s,
        "latency_p10_s": outcome.latency_p10_s,
        "latency_p90_s": outcome.latency_p90_s,
        "s_per_image": outcome.latency_median_s / outcome.spec.batch_size,
        "images_per_s": outcome.spec.batch_size / outcome.latency_median_s,
        "timed_calls": float(len(outcome.samples_s)),
        "import_s": outcome.import_s,
        "load_s": outcome.load_s,
        "calibration_s": outcome.calibration_s,
        "first_call_s": outcome.first_call_s,
        "first_image_s": outcome.first_image_s,
        "warmup_calls": float(len(outcome.warmup_s)),
        **outcome.phases,
        **outcome.memory,
        **outcome.limits,
        **_profile(outcome.profile),
        **{name: value for name, value in outcome.surroundings.items() if not isinstance(value, str)},
        "peak_memory_gib": outcome.peak_memory_gib,
    }
    if outcome.cache_state != "none":
        for name in ("first_call", "first_image"):
            found[f"{name}_{outcome.cache_state}_s"] = found[f"{name}_s"]
    if base is not None:
        found["speedup"] = round(base.latency_median_s / outcome.latency_median_s, 3)
    for name in FIDELITY:
        if (value := getattr(outcome, name)) is not None:
            found[name] = value
    if outcome.one_step:
        found |= {f"one_step_{name}_max": max(outcome.one_step[name]) for name in ONE_STEP}
        if "of_allowed" in outcome.one_step:
            found["one_step_of_allowed_max"] = outcome.one_step["of_allowed"]
    if outcome.accuracy:
        found |= {
            "prompt_accuracy": outcome.accuracy["accuracy"],
            "prompt_accuracy_low": outcome.accuracy["low"],
            "prompt_accuracy_high": outcome.accuracy["high"],
            "prompt_count": outcome.accuracy["prompts"],
        }
        if "psnr_db" in outcome.accuracy:
            found["prompt_psnr_db"] = outcome.accuracy["psnr_db"]
    return found


def _profile(found: dict[str, Any]) -> dict[str, float]:
    """Flat: "profile/denoising_step/linear_ms" and so on."""
    return {
        f"profile/{part}/{kind}_{what}": value
        for part, facts in found.items()
        for kind, figures in facts["classes"].items()
        for what, value in figures.items()
    } | {f"profile/{part}/ms": facts["ms"] for part, facts in found.items()}


def series(outcome: Outcome) -> dict[str, dict[int, float]]:
    """What was measured more than once: by name, and by repeat or denoising step."""
    if isinstance(outcome, Failure):
        return {}
    found = {"latency_sample_s": dict(enumerate(outcome.samples_s))}
    for name in ONE_STEP if outcome.one_step else ():
        found[f"one_step_{name}"] = dict(zip(outcome.one_step["steps"], outcome.one_step[name], strict=True))
    return found


def fingerprint(outcome: Outcome) -> dict[str, str]:
    """Where it was measured, by what, with which flags, and all of it as one hash."""
    facts = outcome.environment
    names = MACHINE if facts.get("gpu") else MACHINE_WITHOUT_GPU
    machine = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    flags = str(facts.get("flags") or "")
    versions = ", ".join(f"{name} {facts[name]}" for name in VERSIONS if facts.get(name))
    return {
        "machine": machine,
        "versions": versions,
        "flags": flags,
        "environment_hash": hashlib.sha256(f"{machine}; {versions}; {flags}".encode()).hexdigest()[:12]
        if facts
        else "",
        "commit": str(facts.get("commit") or ""),
    }


def speedup_base(outcome: Outcome, ladder: Ladder, last: dict[tuple[str, int], Outcome]) -> Result | None:
    """What an outcome's speed-up is against: the result of the ladder's first rung in its round.

    None where that failed, or was measured on another kind of machine or with other versions, as far as is known, and
    in a sweep: what a small image takes less time than a large one is no speed-up.
    """
    if ladder.name == SWEEP:
        return None
    base = last.get((ladder.rungs[0].rung, outcome.spec.round))
    if not isinstance(base, Result):
        return None
    known = {fingerprint(each)["environment_hash"] for each in (outcome, base)} - {""}
    return base if len(known) < 2 else None


def labels(outcome: Outcome, base: Result | None) -> dict[str, str]:
    """What tells the measurement from others, and what is said of it."""
    spec = outcome.spec
    found = {
        "kind": "rung",
        "ladder_id": spec.ladder_id,
        "ladder": spec.ladder,
        "rung": spec.rung,
        "round": str(spec.round),
        "planned_rounds": str(spec.planned_rounds),
        "attempt": str(spec.attempt),
        "measurement_id": spec.measurement_id,
        "conditions": spec.conditions,
        "tag": spec.tag,
        "saved_cache": spec.saved_cache,
        "speedup_base": base.spec.rung if base else "",
        **fingerprint(outcome),
    }
    if isinstance(outcome, Failure):
        return found | {"reason": outcome.reason, "error": outcome.message[:4000], "stage": outcome.stage}
    found |= {
        "cache_state": outcome.cache_state,
        "warmed_up": str(outcome.warmed_up),
        "image_repeats": str(outcome.image_repeats),
        "identical_to_reference": str(outcome.identical_to_reference),
        **({} if outcome.fidelity_ok is None else {"fidelity_ok": str(outcome.fidelity_ok)}),
        **{name: value for name, value in outcome.surroundings.items() if isinstance(value, str)},
        "pipeline_cls": outcome.pipeline_cls,
        "ckpt_id": outcome.ckpt_id,
        "problem": outcome.problem,
    }
    return found | {"warnings": "; ".join(warnings(found | metrics(outcome, base) | typed(found)))}


def warnings(row: dict[str, Any]) -> list[str]:
    """What a reader must know of a rung's row, a clause each."""
    rung, found = row["rung"], []
    if row.get("warmed_up") is False:
        found.append(f"{rung} was still getting faster or slower by more than 5% when it was measured")
    if row.get("image_repeats") is False:
        found.append(f"{rung} made different images from the same seed")
    if row.get("recompilations", 0) > 0 or row.get("cuda_graph_captures", 0) > 0:
        found.append(f"{rung} compiled, or captured a CUDA graph, while it was measured")
    if row.get("others_cpu_share", 0) > OTHERS:
        found.append(f"others used {row['others_cpu_share']:.0%} of the CPU while {rung} was measured")
    if row.get("gpu_processes", 0) > 1:
        found.append(f"another process was on the GPU while {rung} was measured")
    if row.get("held_back"):
        found.append(f"the GPU was held back ({row['held_back']}) while {rung} was measured")
    for part in left_out(optimization_names(row)):
        found.append(f"{rung} repeats one prompt, and what was measured is without {part.replace('_', ' ')}")
    if row.get("fidelity_ok") is False:
        share = row.get("one_step_of_allowed_max")  # measurements from before it was kept have none
        times = f": at a step {share:.2f} times what is allowed" if share else ""
        found.append(f"{rung} loses more than rounding{times}")
    if row.get("problem"):
        found.append(f"{rung}: {row['problem']}")
    return found


def optimization_names(row: dict[str, Any]) -> list[str]:
    """A row's optimizations, one by one."""
    names = row.get("optimizations")  # not a number, in a frame, where there are none
    return [name for name in names.split(",") if name] if isinstance(names, str) else []


def row(outcome: Outcome, base: Result | None) -> dict[str, Any]:
    """All of it, flat. `status` is MLflow's word."""
    status = "FAILED" if isinstance(outcome, Failure) else "FINISHED"
    found = labels(outcome, base) | {"status": status} | parameters(outcome) | metrics(outcome, base)
    return found | typed(found)


def typed(texts: dict[str, Any]) -> dict[str, Any]:
    """The columns that are numbers or flags, out of their strings."""
    found: dict[str, Any] = {}
    for names, convert in ((INTEGERS, int), (FLOATS, float), (FLAGS, lambda text: str(text) == "True")):
        found |= {name: convert(texts[name]) for name in names if texts.get(name) not in (None, "")}
    return found


def seed_row(flat: dict[str, Any]) -> dict[str, Any]:
    """The columns of diffusion-fast's own CSV, by its names."""
    names = optimization_names(flat)
    compiled = compiles(names)
    memory = flat.get("peak_memory_gib")
    return {
        "pipeline_cls": flat.get("pipeline_cls", ""),
        "ckpt_id": flat.get("ckpt_id", ""),
        "bf16": "bf16" in names,
        "sdpa": "sdpa" in names,
        "fused_qkv_projections": "fused_qkv" in names,
        "upcast_vae": "upcast_vae" in names,
        "batch_size": flat["batch_size"],
        "num_inference_steps": flat["steps"],
        "compile_unet": compiled,
        "compile_vae": compiled,
        "compile_mode": flat.get("compile_mode", ""),
        "change_comp_config": "inductor_tuning" in names,
        "do_quant": next((theirs for ours, theirs in SEED_QUANT.items() if ours in names), ""),
        "time (secs)": flat.get("latency_median_s"),
        "memory (gbs)": memory,
        "actual_gpu_memory (gbs)": flat.get("peak_reserved_gib"),
        "tag": flat.get("tag", ""),
    }


def seed_csv(flat: list[dict[str, Any]]) -> str:
    """Rows as CSV: the seed's columns first, ours after them."""
    merged = [seed_row(each) | {key: each[key] for key in each if key != "tag"} for each in flat]
    columns = list(dict.fromkeys(key for each in merged for key in each))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged)
    return text.getvalue()
