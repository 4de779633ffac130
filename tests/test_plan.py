"""A recipe is possible, or is refused in one sentence before anything loads."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusion_fast import plan, world
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, STAGES, WORDS
from diffusion_fast.recipes import AA, ABLATION, LADDERS, LOSSLESS
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned

PLANS = Path(__file__).parent / "plans.json"
A100 = plan.Device("cuda", "NVIDIA A100", (8, 0))
V100 = plan.Device("cuda", "NVIDIA V100", (7, 0))


@pytest.mark.parametrize(
    ("names", "device", "says"),
    [
        (("int8_dynamic",), CPU, "int8_dynamic requires bf16 or fp16"),
        (("bf16", "int8_dynamic"), CPU, "int8_dynamic requires compile or regional_compile: add compile"),
        (("fused_qkv",), CPU, "fused_qkv requires sdpa"),
        (("inductor_tuning",), CPU, "inductor_tuning requires compile or regional_compile"),
        (("bf16", "fp16"), H100, "exclude each other"),
        (("fp16", "int4_weight_only"), H100, "int4_weight_only requires bf16, which fp16 excludes"),
        (("tf32",), CPU, "tf32 runs on cuda only, and this is a cpu"),
        (
            ("bf16", "compile", "int8_dynamic"),
            V100,
            "int8_dynamic needs compute capability 8.0, and NVIDIA V100 has 7.0",
        ),
        (("fp16",), CPU, "fp16 runs on cuda only"),
        (("vae_fp16_fix",), CPU, "vae_fp16_fix can't be applied to tiny"),
        (("int8_dynamik",), CPU, "the nearest are int8_dynamic"),
    ],
)
def test_an_impossible_recipe_is_refused_in_one_sentence(
    names: tuple[str, ...], device: plan.Device, says: str
) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        plan.plan_recipe(MODELS["tiny"], Recipe("mine", names), device)
    assert str(refusal.value).count("\n") == 0


def test_fp16_requires_the_other_vae_where_the_models_own_overflows() -> None:
    with pytest.raises(ValueError, match="fp16 requires vae_fp16_fix or tiny_vae or upcast_vae on sdxl"):
        plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("fp16",)), H100)
    assert plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("fp16", "vae_fp16_fix")), H100)
    assert plan.plan_recipe(MODELS["tiny"], Recipe("mine", ("fp16",)), H100) == ("fp16",)


def test_the_stage_decides_the_order_not_the_person() -> None:
    typed = ("inductor_tuning", "int8_dynamic", "compile", "fused_qkv", "sdpa", "bf16")
    applied = plan.plan_recipe(MODELS["sdxl"], Recipe("mine", typed), A100)
    assert applied == ("bf16", "sdpa", "fused_qkv", "int8_dynamic", "inductor_tuning", "compile")


def test_every_ladder_plans_for_every_model_on_a_cpu_and_on_a_gpu() -> None:
    for name in set(LADDERS) - {ABLATION}:
        for model in MODELS:
            for device in (CPU, H100):
                ladder = planned(name, device, model)
                left_out = [note for note in ladder.notes if note.startswith("the rung")]
                one_in_bf16 = MODELS[model].large and name.startswith("progressive")  # baseline and bf16
                assert len(ladder.rungs) == len(LADDERS[name]) - len(left_out) - one_in_bf16
                lacking = any(f"{model} has no" in note for note in ladder.notes)
                assert not left_out or (name, device) == ("fast", CPU) or lacking


@pytest.mark.parametrize("model", MODELS)
def test_every_plan_is_as_it_was_written_down(model: str) -> None:
    """tests/plans.json: what every ladder has, for every model and kind of device. After a change that is meant:

    python -m tests.test_plan
    """
    assert all_plans(model) == json.loads(PLANS.read_text())[model]


def test_progressive_is_the_six_published_rungs() -> None:
    rungs = planned(device=H100, model="sdxl").rungs
    assert [spec.rung for spec in rungs] == [
        "00-baseline",
        "01-bf16",
        "02-sdpa",
        "03-compile",
        "04-fused-qkv",
        "05-int8-dynamic",
    ]
    added = [set(after.optimizations) - set(before.optimizations) for before, after in pairwise(rungs)]
    compiling = {"channels_last", "conv_as_linear", "compile", "inductor_tuning"}
    assert added == [{"bf16"}, {"sdpa"}, compiling, {"fused_qkv"}, {"int8_dynamic"}]
    assert rungs[0].optimizations == ("tf32",)


def test_a_cpu_leaves_tf32_out_and_says_so() -> None:
    ladder = planned()
    assert all("tf32" not in spec.optimizations for spec in ladder.rungs)
    assert "tf32" in ladder.notes[0]
    assert planned(device=H100).notes == ()


def test_a_rung_that_would_measure_nothing_new_is_left_out_and_said() -> None:
    ladder = planned("fast")
    names = [
        "baseline",
        "int8-dynamic-default",
        "regional",
        "postprocessing",
        "layout",
        "norms",
        "geglu",
        "prompt",
        "add-norm",
        "time",
        "walks",
        "attention-kernel",
        "int8",
        "fp8",
        "convolutions",
    ]
    assert [spec.recipe for spec in ladder.rungs] == names
    assert "the rung graph is left out: here it would be regional again" in ladder.notes
    assert "cuda_graph is left out: it runs on another device than this cpu" in ladder.notes
    assert [spec.recipe for spec in planned("aa").rungs] == ["a", "b"]  # these are meant to be the same
    assert planned("fast", H100, "sdxl").notes == ()
    assert planned("fast", H100).notes == (
        "sliced_vae_attention is left out: tiny has no VAE with a head too wide for fused attention",
        "the rung vae is left out: here it would be time again",
    )


def test_what_a_model_lacks_is_left_out_and_said() -> None:
    ladder = planned("turbo", H100)
    assert "tiny_vae is left out: tiny has no tiny VAE that is known here" in ladder.notes
    assert "the rung all is left out: here it would be cutoff-and-forecast again" in ladder.notes
    assert {spec.recipe for spec in planned("turbo", H100, "sdxl").rungs} > {"tiny-vae", "all"}


def test_an_older_gpu_climbs_the_ladder_without_what_it_lacks() -> None:
    a100 = plan.Device("cuda", "NVIDIA A100", (8, 0))
    ladder = planned("fast", a100, "sdxl")
    assert "fp8_rows is left out: NVIDIA A100 has too low a compute capability" in ladder.notes
    newer = {"geglu", "attention-kernel", "int8", "fp8", "convolutions"}  # their kernels are Hopper's
    assert [spec.recipe for spec in ladder.rungs] == [each.name for each in LADDERS["fast"] if each.name not in newer]


@pytest.mark.parametrize("device", (CPU, A100, H100))
@pytest.mark.parametrize("model", MODELS)
def test_an_ablation_leaves_each_name_out_in_turn_and_what_requires_it(model: str, device: plan.Device) -> None:
    full, *others = planned(ABLATION, device, model).rungs
    whole = set(full.optimizations)
    assert full.rung == "00-full"
    in_fp32 = {"bf16"} if MODELS[model].large else set()
    assert [spec.recipe.split("-")[1] for spec in others] == [
        each for each in full.optimizations if each not in in_fp32
    ]
    for spec in others:
        _, name, *with_it = spec.recipe.split("-")
        assert whole - set(spec.optimizations) == {name, *with_it}
        for each in with_it:  # none is left out that could have stayed
            with pytest.raises(ValueError, match=f"{each} requires"):
                plan.plan_recipe(MODELS[model], Recipe("mine", (*spec.optimizations, each)), device)


def test_an_ablation_is_of_the_best_lossless_recipe_as_far_as_the_device_goes() -> None:
    assert set(planned(ABLATION, H100, "sdxl").rungs[0].optimizations) == set(LOSSLESS.optimizations)
    on_cpu = planned(ABLATION, CPU, "sdxl")
    assert not {"tf32", "cuda_graph"} & set(on_cpu.rungs[0].optimizations)
    assert "tf32 is left out: it runs on another device than this cpu" in on_cpu.notes
    recipes = [spec.recipe for spec in on_cpu.rungs]
    assert "without-sdpa-attention_kernel-fused_qkv" in recipes
    assert "without-channels_last-group_norm_kernels-no_layout_copies" in recipes


def test_a_ladder_about_one_recipe_takes_any_ladders() -> None:
    def rungs(name: str, about: str) -> list[tuple[str, frozenset[str], str]]:
        recipes, _ = plan.find_ladder(name, H100, MODELS["sdxl"], about)
        planned = plan.plan_ladder(name, recipes, MODELS["sdxl"], H100, plan.Settings()).rungs
        return [(spec.recipe, frozenset(spec.optimizations), spec.compile_mode) for spec in planned]

    names = frozenset(LOSSLESS.optimizations)
    assert rungs(AA, "attention-kernel") == [("a", names, "default"), ("b", names, "default")]
    assert rungs(AA, "int8-dynamic-default")[0][2] == "default"
    assert [each[0] for each in rungs(AA, "8-bits-50")] == ["a", "b"]
    full, *others = rungs(ABLATION, "convolutions")
    assert full[1] == names | {"fp8_rows", "int8_convolutions"}
    assert others[-1] != full and {each[0] for each in others} > {"without-int8_convolutions", "without-cuda_graph"}
    with pytest.raises(ValueError, match="--recipe is for ladders about one recipe: aa and ablation; fast has its own"):
        rungs("fast", "fp8")
    with pytest.raises(ValueError, match="There is no recipe 'fp9': the nearest are fp8"):
        rungs(AA, "fp9")


def test_a_large_models_ladders_begin_in_16_bits_and_its_reference_does_not() -> None:
    ladder = planned(device=H100, model="flux-schnell", weights="random")
    assert [spec.rung for spec in ladder.rungs][:2] == ["00-bf16", "01-sdpa"]
    assert ladder.reference.optimizations == ()
    assert "bf16 in the place of what is in fp32: flux-schnell is too large for that" in ladder.notes
    assert [spec.rung for spec in planned("fast", H100, "flux-schnell").rungs][:2] == [
        "00-bf16",
        "01-int8-dynamic-default",
    ]
    turbo = planned("turbo", H100, "flux-schnell")
    assert turbo.rungs[0].recipe == "plain" and not any("too large" in note for note in turbo.notes)
    assert all({"bf16"} <= set(spec.optimizations) for spec in planned(ABLATION, H100, "flux-dev").rungs)
    alike = planned(AA, H100, "flux-dev", about="baseline").rungs
    assert [(spec.recipe, spec.optimizations) for spec in alike] == [("a", ("tf32", "bf16")), ("b", ("tf32", "bf16"))]


def test_a_control_that_rounds_to_the_steps_of_another_is_left_out() -> None:
    ladder = planned("turbo", H100, "flux-schnell")
    assert [(spec.recipe, spec.steps) for spec in ladder.rungs if spec.steps < 4] == [
        ("plain-80", 3),
        ("plain-50", 2),
        ("plain-33", 1),
        ("8-bits-67", 3),
        ("8-bits-57", 2),
    ]
    assert "the rung plain-67 is left out: here it would be plain-80 again" in ladder.notes


def test_without_guidance_what_is_about_it_is_left_out_or_refused() -> None:
    ladder = planned("turbo", H100, "sdxl", guidance_scale=1.0)
    assert not any("guidance_cutoff" in spec.optimizations for spec in ladder.rungs)
    assert "feature-forecast" in {spec.recipe for spec in ladder.rungs}
    assert any("guidance-cutoff" in note and "there is no guidance at 1" in note for note in ladder.notes)
    refused = "guidance_cutoff needs a guidance scale above 1, and there is no guidance at 1"
    with pytest.raises(ValueError, match=refused):
        planned(ABLATION, H100, "sdxl", about="guidance-cutoff", guidance_scale=1.0)
    with pytest.raises(ValueError, match=refused):
        plan.plan_ladder(
            "run", (Recipe("mine", ("guidance_cutoff",)),), MODELS["sdxl"], CPU, plan.Settings(guidance_scale=1.0)
        )


def test_a_name_means_one_recipe_in_all_ladders() -> None:
    known: dict[str, Recipe] = {}
    for ladder in set(LADDERS) - {AA, ABLATION}:
        for recipe in LADDERS[ladder]:
            assert known.setdefault(recipe.name, recipe) == recipe


def test_random_weights_say_nothing_of_approximations() -> None:
    assert any(
        "random weights paint no picture" in note for note in planned("turbo", H100, "sdxl", weights="random").notes
    )
    assert not any("random weights" in note for note in planned("fast", H100, "sdxl", weights="random").notes)


def test_fp16_takes_either_vae_that_stays_finite() -> None:
    for vae in ("vae_fp16_fix", "tiny_vae"):
        assert plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("fp16", vae)), H100)
    with pytest.raises(
        ValueError, match="fp16 requires vae_fp16_fix or tiny_vae or upcast_vae on sdxl: add vae_fp16_fix"
    ):
        plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("fp16",)), H100)


def test_a_recipe_of_ones_own_is_refused_for_what_runs_elsewhere() -> None:
    with pytest.raises(ValueError, match="fp16 runs on cuda only"):
        plan.plan_recipe(MODELS["tiny"], Recipe("mine", ("fp16",)), CPU)


def test_controls_have_their_share_of_the_steps() -> None:
    rungs = planned("turbo", H100, "sdxl").rungs
    steps = {spec.recipe: spec.steps for spec in rungs}
    assert [steps[name] for name in ("plain", "plain-80", "plain-50", "plain-33", "plain-20")] == [30, 24, 15, 10, 6]
    assert {spec.steps for spec in rungs if "feature_reuse" in spec.optimizations} == {30}
    assert {spec.optimizations for spec in rungs if spec.recipe.startswith("plain")} == {rungs[0].optimizations}
    assert min(spec.steps for spec in planned("turbo", steps=1).rungs) == 1


def test_a_captured_recipe_takes_a_mode_that_captures_nothing_itself() -> None:
    compiled = Recipe("mine", ("bf16", "sdpa", "regional_compile", "cuda_graph"))

    def mode(recipe: Recipe, chosen: str | None = None) -> str:
        settings = plan.Settings(compile_mode=chosen)
        return plan.plan_ladder("run", (recipe,), MODELS["tiny"], H100, settings).rungs[0].compile_mode

    assert mode(compiled) == "default"
    assert mode(compiled, "max-autotune-no-cudagraphs") == "max-autotune-no-cudagraphs"
    with pytest.raises(ValueError, match="cuda_graph excludes compile mode reduce-overhead: take default or"):
        mode(compiled, "reduce-overhead")
    assert mode(Recipe("mine", ("sdpa", "cuda_graph"))) == "max-autotune"  # nothing compiles: it has no meaning


def test_the_reference_is_plain_whatever_the_first_rung_is() -> None:
    assert planned(device=H100).reference.optimizations == ()


def test_the_compile_mode_follows_the_device_unless_asked() -> None:
    assert {spec.compile_mode for spec in planned().rungs} == {"default"}
    assert {spec.compile_mode for spec in planned(device=H100).rungs} == {"max-autotune"}
    assert {spec.compile_mode for spec in planned(compile_mode="reduce-overhead").rungs} == {"reduce-overhead"}


def test_a_recipe_about_a_mode_keeps_it() -> None:
    rungs = planned("progressive-modes", H100, "sdxl").rungs
    assert [spec.compile_mode for spec in rungs[3:]] == ["max-autotune"] * 3 + ["default"] * 3
    for tuned, plain in zip(rungs[3:6], rungs[6:], strict=True):
        assert set(tuned.optimizations) - set(plain.optimizations) == {"inductor_tuning"}


def test_the_mode_that_is_asked_for_is_taken_or_what_keeps_its_own_is_said() -> None:
    ladder = planned("fast", H100, "sdxl", compile_mode="max-autotune-no-cudagraphs")
    modes = {spec.recipe: spec.compile_mode for spec in ladder.rungs}
    assert modes.pop("int8-dynamic-default") == "default"
    assert set(modes.values()) == {"max-autotune-no-cudagraphs"}
    assert ladder.notes == ("int8-dynamic-default stays in compile mode default: it is about that",)
    with pytest.raises(ValueError, match="cuda_graph excludes compile mode max-autotune"):
        planned("fast", H100, "sdxl", compile_mode="max-autotune")


@pytest.mark.parametrize("settings", [{"steps": 0}, {"batch_size": -1}, {"height": 100}, {"compile_mode": "fast"}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|There is no compile mode 'fast'"):
        planned(**settings)


def test_settings_fall_back_on_the_model() -> None:
    first = planned(model="sdxl", steps=4).rungs[0]
    assert (first.height, first.width, first.steps, first.guidance_scale) == (1024, 1024, 4, 5.0)
    assert planned(guidance_scale=0.0).rungs[0].guidance_scale == 0.0


def test_no_gpu_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan.find_device("auto").kind == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        plan.find_device("cuda")


def test_every_optimization_is_documented_and_staged() -> None:
    for each in OPTIMIZATIONS.values():
        assert each.summary.endswith("."), each.name
        assert each.stage in STAGES
        assert each.model_needs in ("", *WORDS), each.name
        for name in (*each.excludes, *(name for group in each.requires for name in group)):
            assert name in OPTIMIZATIONS, f"{each.name} names {name}"


def test_the_bundled_model_has_a_prompt_of_its_world_and_says_so_of_any_other() -> None:
    ladder = planned()
    assert world.parse(ladder.rungs[0].prompt) is not None
    assert not any("small world" in note for note in ladder.notes)
    (note,) = [note for note in planned(prompt="a cat").notes if "small world" in note]
    assert "this prompt isn't one" in note
    assert planned(prompt="a cat", model="sdxl", weights="random").notes == ladder.notes


def test_only_what_can_be_judged_paints_prompts_for_the_judge() -> None:
    ladder = planned()
    assert {spec.accuracy_prompts for spec in ladder.rungs} == {8}
    assert ladder.reference.accuracy_prompts == 8  # its pictures are what theirs are compared with
    assert {spec.accuracy_prompts for spec in planned(accuracy_prompts=500).rungs} == {500}
    assert {spec.accuracy_prompts for spec in planned(height=64).rungs} == {0}  # the judge knows sizes in pixels
    with pytest.raises(ValueError, match="128×128 alone"):
        planned(width=256, accuracy_prompts=8)
    assert {spec.accuracy_prompts for spec in planned(model="sdxl", weights="random").rungs} == {0}


def test_exclusive_is_about_a_gpu_and_refuses_company(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    with pytest.raises(ValueError, match="runs on a CPU"):
        plan.refuse_company(CPU)
    there: list[SimpleNamespace] = []
    for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByIndex"):
        monkeypatch.setattr(pynvml, name, lambda *_: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan.refuse_company(H100)
    there.append(SimpleNamespace(pid=4321))
    with pytest.raises(ValueError, match="1 other processes are on NVIDIA H100"):
        plan.refuse_company(H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="doesn't say which processes"):
        plan.refuse_company(H100)


def test_fewer_steps_than_a_pipeline_can_make_are_refused() -> None:
    with pytest.raises(ValueError, match="pixart-alpha can't be run with fewer than 2 steps"):
        planned(model="pixart-alpha", steps=1)
    shortest = min(spec.steps for spec in planned("turbo", H100, "pixart-alpha", steps=5).rungs)
    assert shortest == 2


def all_plans(model: str) -> dict[str, list[str]]:
    """By device and ladder its rungs: steps, mode, and what each has and the one before hasn't, or the other way."""
    found: dict[str, list[str]] = {}
    for device in (CPU, A100, H100):
        for name in LADDERS:
            before: set[str] = set()
            lines = found[f"{name} on {device.name}"] = []
            for spec in planned(name, device, model).rungs:
                added = [f"+{each}" for each in spec.optimizations if each not in before]
                gone = sorted(f"-{each}" for each in before - set(spec.optimizations))
                lines.append(f"{spec.rung}, {spec.steps}, {spec.compile_mode}: {' '.join([*added, *gone])}".rstrip())
                before = set(spec.optimizations)
    return found


if __name__ == "__main__":
    PLANS.write_text(json.dumps({model: all_plans(model) for model in MODELS}, indent=1) + "\n")
