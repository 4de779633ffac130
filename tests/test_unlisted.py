"""Models without an entry: folders in diffusers' format and hub ids."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxPipeline, Lumina2Pipeline, Lumina2Transformer2DModel, SanaPipeline
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0

from diffusion_fast import chained, plan, scores, spool, unlisted
from diffusion_fast import ladder as climbing
from diffusion_fast.cli import main
from diffusion_fast.models import MODELS, PACKAGE, WEIGHTS_FILE, WeightsUnreachableError, check_weights, model_of
from diffusion_fast.optimizations import OPTIMIZATIONS, Build
from diffusion_fast.pipeline import _from_config, _vanilla_attention, build_pipeline, call
from diffusion_fast.spec import Ladder, Model, Recipe, Result, RunSpec
from tests.conftest import CPU, planned
from tests.miniatures import LONG_CONTEXT, NAMES, hunyuan_dit, saved

TOKEN = "hf_a-marker-that-nobody-may-see"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("sd15", tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def altered(sd15: Path, tmp_path: Path) -> Any:
    """A function that gives a copy of the folder, with one of its JSON files changed."""

    def alter(file: str = unlisted.INDEX, **changes: Any) -> str:
        folder = shutil.copytree(sd15, tmp_path / "altered")
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
        return str(folder)

    return alter


def test_a_folder_says_what_its_model_is(sd15: Path) -> None:
    model = plan.find_model(str(sd15))
    assert (model.name, model.pipeline, model.denoiser) == ("my sd15", "StableDiffusionPipeline", "unet")
    assert (model.height, model.width) == (512, 512)  # 64 latents, of 8 pixels each
    assert (model.steps, model.guidance_scale) == (50, 7.5)  # of the pipeline's signature
    assert model.default_weights == str(sd15.resolve())
    check_weights(model, model.default_weights)


def test_a_transformer_is_found_by_its_attribute_and_keeps_what_its_class_needs(tmp_path: Path) -> None:
    model = plan.find_model(str(saved("pixart-alpha", tmp_path)))
    assert (model.denoiser, model.height, model.steps, model.guidance_scale) == ("transformer", 1024, 20, 4.5)
    assert (model.least_steps, model.call_arguments) == (2, MODELS["pixart-alpha"].call_arguments)
    recipe = Recipe("mine", ("sdpa", "fused_qkv"))
    settings = plan.Settings(height=64, width=64, steps=2)
    (spec,) = plan.plan_ladder("run", (recipe,), model, CPU, settings).rungs
    build, applied = build_pipeline(RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))), lambda stage: None)
    assert set(applied) == set(recipe.optimizations)
    assert call(build)[0].size == (64, 64)
    with pytest.raises(ValueError, match="feature_reuse can't be applied to my pixart-alpha: it has no UNet"):
        plan.plan_recipe(model, Recipe("mine", ("feature_reuse",)), CPU)


@pytest.fixture
def lumina(tmp_path: Path) -> Path:
    """A model of a class that no entry has, whose attention can't be set: other queries than keys, boolean masks."""
    for name in ("sana", "flux-dev"):
        (tmp_path / name).mkdir()
    sana = SanaPipeline.from_pretrained(saved("sana", tmp_path / "sana"))
    flux = FluxPipeline.from_pretrained(saved("flux-dev", tmp_path / "flux-dev"))
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(512, 64, 64),
        cap_feat_dim=LONG_CONTEXT,
    )
    pipe = Lumina2Pipeline(transformer, flux.scheduler, flux.vae, sana.text_encoder, sana.tokenizer)
    pipe.save_pretrained(tmp_path / "lumina")
    return tmp_path / "lumina"


def test_attention_that_cant_be_set_is_written_out_nevertheless(lumina: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plan.find_model(str(lumina))
    attend, written, pictures = scores.attend, [], []

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        written.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(scores, "attend", noted)
    for names in ((), ("sdpa",)):
        written.clear()
        (spec,) = plan.plan_ladder("run", (Recipe("mine", names),), model, CPU, plan.Settings(steps=2)).rungs
        build, applied = build_pipeline(spec, lambda stage: None)
        with torch.no_grad():
            pictures.append(numpy.asarray(call(build)[0]).astype(int))
        # Two layers, a refiner each of noise and of text, two steps, with guidance a call of the denoiser a branch.
        assert len(written) == (0 if names else 4 * 2 * 2)
    assert applied["sdpa"]["attention_layers"] == 4 + build.pipe.text_encoder.config.num_hidden_layers
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_a_default_that_is_a_fused_kernel_is_written_out_and_given_back(lumina: Path) -> None:
    """By diffusers' AttnProcessor2_0, which sdpa gives networks whose default is vanilla, it would lose its turns."""
    model = plan.find_model(str(lumina))
    (spec,) = plan.plan_ladder("run", (Recipe("mine", ("sdpa",)),), model, CPU, plan.Settings()).rungs
    network = hunyuan_dit()
    pipe = SimpleNamespace(transformer=network, components={"transformer": network})
    build = Build(model, spec, pipe=pipe)
    _vanilla_attention(build)
    assert {type(each) for each in network.attn_processors.values()} == {scores.WithScores}
    assert OPTIMIZATIONS["sdpa"].apply(build) == {"attention_layers": 2 * 2}
    assert {type(each) for each in network.attn_processors.values()} == {HunyuanAttnProcessor2_0}


def test_what_nobody_has_seen_of_a_transformer_is_refused_before_it_is_loaded(lumina: Path) -> None:
    model = plan.find_model(str(lumina))
    with pytest.raises(ValueError, match="fused_qkv can't be applied to lumina: it has no projections that"):
        plan.plan_recipe(model, Recipe("mine", ("sdpa", "fused_qkv")), CPU)


def test_a_pipeline_that_says_its_size_itself_is_asked(lumina: Path) -> None:
    config = json.loads((lumina / "transformer" / "config.json").read_text())
    (lumina / "transformer" / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    assert plan.find_model(str(lumina)).height == 128 * 8
    assert unlisted.default_sample_size("ChromaPipeline") == 128
    assert unlisted.default_sample_size("StableDiffusionPipeline") is None  # its denoiser's config does


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("BriaPipeline", "its own size of pictures can't be told from its configs or its source"),  # 2×2 latents each
        ("Flux2Pipeline", "it makes rows of latents otherwise than FLUX does"),
        ("QwenImagePipeline", "its call has no default for its guidance scale or number of steps"),
        ("ZImagePipeline", "its own size of pictures can't be told from its configs or its source"),
    ],
)
def test_what_would_be_painted_in_another_size_or_not_at_all_is_refused(kind: str, reason: str, tmp_path: Path) -> None:
    described("flux-dev", tmp_path)  # whose transformer's config has no size
    (tmp_path / unlisted.INDEX).write_text(
        json.dumps({"_class_name": kind} | {part: ["diffusers", "AnyClass"] for part in ("transformer", "vae")})
    )
    with pytest.raises(ValueError, match=f"^{kind} isn't known here: {reason}.$"):
        plan.find_model(str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_of_a_class_is_so_of_a_folder_of_it(name: str, tmp_path: Path) -> None:
    """No weights are read, so that there are none here: the configs are the entry's, at full size."""
    entry, found = MODELS[name], described(name, tmp_path)
    same = ("denoiser", "height", "width", "guidance", "multiple", "lacks", "written_out", "cacheable_blocks", "large")
    assert found.int8_excluded_shapes == entry.int8_excluded_shapes  # int8_dynamic means the same layers
    for field in (*same, "least_steps", "chained_blocks"):
        assert getattr(found, field) == getattr(entry, field), field
    applying = {each for each, known in OPTIMIZATIONS.items() if plan.applies(known, entry)}
    assert {each for each, known in OPTIMIZATIONS.items() if plan.applies(known, found)} == applying - {
        *("vae_fp16_fix", "tiny_vae")  # networks that nobody names here
    }


def described(name: str, folder: Path, **schedule: Any) -> Model:
    """What is said of the configs of `name`, in diffusers' format, with some of its scheduler's numbers changed."""
    entry = MODELS[name]
    configs = PACKAGE / "configs" / entry.configs
    for part in (entry.denoiser, "vae", "scheduler"):
        (folder / part).mkdir()
    for part in (entry.denoiser, "vae"):
        shutil.copy(configs / f"{part}.json", folder / part / "config.json")
    scheduler = json.loads((configs / "scheduler.json").read_text()) | schedule
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    parts = {part: ["diffusers", "AnyClass"] for part in (entry.denoiser, "vae", "scheduler")}
    (folder / unlisted.INDEX).write_text(json.dumps({"_class_name": entry.pipeline} | parts))
    return plan.find_model(str(folder))


def test_an_sdxl_of_another_pipeline_has_the_published_list_too(tmp_path: Path) -> None:
    folder = Path(described("sdxl", tmp_path).folder)
    index = json.loads((folder / unlisted.INDEX).read_text())
    (folder / unlisted.INDEX).write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPAGPipeline"}))
    assert plan.find_model(str(folder)).int8_excluded_shapes == MODELS["sdxl"].int8_excluded_shapes
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 768}))
    assert plan.find_model(str(folder)).int8_excluded_shapes == ()


def test_a_model_with_flux_schnells_configs_takes_its_steps(tmp_path: Path) -> None:
    model = described("flux-schnell", tmp_path)
    assert (model.steps, model.guidance_scale, model.steps_known) == (4, 0.0, True)
    assert model.call_arguments == MODELS["flux-schnell"].call_arguments
    ladder = plan.plan_ladder("run", (Recipe("baseline"),), model, CPU, plan.Settings())
    assert [(spec.steps, spec.guidance_scale) for spec in ladder.rungs] == [(4, 0.0)]
    assert ladder.notes == ()


@pytest.mark.parametrize(
    ("name", "schedule", "guidance"),
    [
        ("flux-schnell", {"use_dynamic_shifting": True}, "none"),  # as FLUX.1 dev without its distilled guidance has it
        ("flux-schnell", {"shift": 3.0}, "none"),
        ("flux-dev", {"shift": 1.0, "use_dynamic_shifting": False}, "embedded"),
    ],
)
def test_what_no_config_tells_is_left_to_the_pipelines_call_and_said(
    name: str, schedule: dict[str, Any], guidance: str, tmp_path: Path
) -> None:
    model = described(name, tmp_path, **schedule)
    assert (model.steps, model.guidance_scale, model.guidance, model.steps_known) == (28, 3.5, guidance, False)
    recipes = (Recipe("baseline"),)
    note = "no config says how many steps it was made for: 28 are the default of FluxPipeline's call"
    assert plan.plan_ladder("run", recipes, model, CPU, plan.Settings()).notes == (note,)
    assert plan.plan_ladder("run", recipes, model, CPU, plan.Settings(steps=8)).notes == ()


def test_a_pipeline_without_a_scheduler_of_its_own_tells_nothing(tmp_path: Path) -> None:
    described("flux-schnell", tmp_path)
    index = tmp_path / unlisted.INDEX
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": [None, None]}))
    assert plan.find_model(str(tmp_path)).steps == 28


def test_a_transformer_of_an_unknown_class_is_taken_for_one_without_vanilla_attention() -> None:
    kind = "AuraFlowPipeline"
    defaults, more = unlisted.call_defaults(kind), {"summary": "", "parameters": 0}
    model = unlisted.describe("mine", kind, "transformer", {"sample_size": 64}, {}, 8, defaults, **more)
    with pytest.raises(ValueError, match="compile requires sdpa on mine: add sdpa"):
        plan.plan_recipe(model, Recipe("mine", ("bf16", "compile")), CPU)
    assert plan.plan_recipe(model, Recipe("mine", ("bf16", "sdpa", "compile")), CPU)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sdxl", {}),
        ("ssd-1b", {}),
        ("sd15", {}),
        ("sd15", {"transformer_layers_per_block": 3}),
        ("sd15", {"transformer_layers_per_block": [5, 2, 1, 9]}),  # its last level has no attention, but its middle
        ("sd15", {"transformer_layers_per_block": [5, 2, 1, 9], "mid_block_type": None}),
        ("sd15", {"transformer_layers_per_block": 2, "dual_cross_attention": True}),
        ("sd15", {"transformer_layers_per_block": 2, "attention_type": "gated"}),
    ],
)
def test_blocks_in_a_row_are_counted_as_in_the_network(name: str, changes: dict[str, Any]) -> None:
    config = json.loads((PACKAGE / "configs" / MODELS[name].configs / "unet.json").read_text()) | changes
    with torch.device("meta"):
        network = _from_config(config)
    assert unlisted._chained_blocks(config) == chained.longest(network)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("StableDiffusionXLPipeline", {"num_inference_steps": 50, "guidance_scale": 5.0, "height": None}),
        ("PixArtAlphaPipeline", {"num_inference_steps": 20, "guidance_scale": 4.5, "use_resolution_binning": True}),
    ],
)
def test_a_calls_defaults_are_those_that_python_sees(kind: str, expected: dict[str, Any]) -> None:
    import inspect

    import diffusers

    found = unlisted.call_defaults(kind)
    assert expected.items() <= found.items()
    parameters = dict(inspect.signature(getattr(diffusers, kind).__call__).parameters)
    assert {"self", *found} >= set(parameters) - {"kwargs"}


def test_a_spec_carries_the_model_and_an_entrys_does_not(sd15: Path) -> None:
    model = plan.find_model(str(sd15))
    ladder = plan.plan_ladder("run", (Recipe("baseline"),), model, CPU, plan.Settings())
    again = Ladder.from_dict(json.loads(json.dumps(ladder.to_dict())))
    assert again == ladder
    assert model_of(again.rungs[0]) == model
    assert "/" not in ladder.id and " " not in ladder.id
    listed = planned(model="sdxl").rungs[0]
    assert listed.unlisted is None
    assert model_of(listed) is MODELS["sdxl"]


def test_what_was_measured_of_entries_before_keeps_its_hash() -> None:
    data = planned().rungs[0].to_dict()
    del data["unlisted"]  # as a spec of before has it
    assert RunSpec.from_dict(data).conditions == planned().rungs[0].conditions


def test_a_ladder_of_a_folder_is_resumed_and_that_of_another_folder_is_not(sd15: Path, tmp_path: Path) -> None:
    def plan_it(folder: Path) -> Ladder:
        model = plan.find_model(str(folder))
        return plan.plan_ladder("run", (Recipe("baseline"),), model, CPU, plan.Settings(steps=1))

    folder = spool.save_ladder(tmp_path / "spool", plan_it(sd15))
    assert climbing.find_resumable(tmp_path / "spool", plan_it(sd15)) == folder
    other = shutil.copytree(sd15, tmp_path / "elsewhere" / sd15.name)
    assert climbing.find_resumable(tmp_path / "spool", plan_it(other)) is None


def test_an_entrys_hub_id_is_the_entry() -> None:
    assert plan.find_model("segmind/SSD-1B") is MODELS["ssd-1b"]
    assert plan.find_model("stabilityai/stable-diffusion-xl-base-1.0") is MODELS["sdxl"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"unet": [None, None], "prior": ["diffusers", "PriorTransformer"]},
            "StableDiffusionPipeline has neither a unet nor a transformer: its parts are prior, ",
        ),
        ({"_class_name": "MyPipeline"}, "diffusers has no pipeline MyPipeline whose call could be read"),
        ({"_class_name": ["mine", "MyPipeline"]}, "no class of diffusers in its model_index.json"),
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
            "StableDiffusionXLImg2ImgPipeline doesn't go from text to image as is measured here: its call takes no he",
        ),
    ],
)
def test_what_is_no_such_pipeline_is_refused_naming_what_was_found(
    changes: dict[str, Any], reason: str, altered: Any
) -> None:
    done = CliRunner().invoke(main, ("run", "--no-track", "--model", altered(**changes)))
    assert (done.exit_code, reason in done.output) == (2, True), done.output


def test_a_folder_that_is_no_model_or_is_none_is_refused(sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no model in diffusers' format: it has no model_index\.json"):
        plan.find_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"There is no model '\./nowhere'"):
        plan.find_model("./nowhere")
    folder = shutil.copytree(sd15, tmp_path / "half")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no unet/config\.json"):
        plan.find_model(str(folder))
    (folder / unlisted.INDEX).write_text("{")
    with pytest.raises(ValueError, match="isn't JSON"):
        plan.find_model(str(folder))


class Hub(BaseHTTPRequestHandler):
    """Answers every question by `status` and `code`, and repeats the token that it was asked with.

    Of what is in `gated` it tells everybody, and gives nothing.
    """

    status, code = 404, "RepoNotFound"
    gated: ClassVar[tuple[str, ...]] = ()
    asked_with: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        token = self.headers["Authorization"] or ""
        if self.path.startswith("/api/models/"):
            self.asked_with.append(token)
        status, code, told = self.status, self.code, b""
        for name in self.gated:
            if self.path == f"/api/models/{name}":
                status, code, told = 200, "", json.dumps({"id": name, "gated": "manual"}).encode()
            elif name in self.path:
                status, code = 403, "GatedRepo"
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("X-Error-Message", token), ("Content-Length", str(len(told)))):
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A hub of its own for each test, which nobody else is asked instead of. The token is a person's."""
    monkeypatch.setattr(Hub, "asked_with", [])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Hub
        server.shutdown()
        thread.join()


def asked_for(name: str, folder: Path, command: str = "ladder") -> Any:
    done = CliRunner().invoke(main, (command, "--spool", str(folder / "spool"), "--model", name))
    assert TOKEN not in done.output
    assert not (folder / "spool").exists()
    return done


@pytest.mark.parametrize("command", ["ladder", "run", "sweep"])
@pytest.mark.parametrize(
    ("name", "nearest"), [("segmind/SSD-1b", "segmind/SSD-1B, ssd-1b"), ("a/b", "tiny, sdxl"), ("sdxl/base", "sdxl, ")]
)
def test_a_name_that_is_nowhere_is_bad_input_and_has_neighbours(
    name: str, nearest: str, command: str, hub: type[Hub], tmp_path: Path
) -> None:
    done = asked_for(name, tmp_path, command)
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(
        f"Error: The model {name!r} can't be found (it is no folder, nor is it on the hub, where HF_TOKEN opens what "
        f"is private): the nearest are {nearest}"
    )
    assert hub.asked_with == [f"Bearer {TOKEN}"]


def test_a_name_that_the_hub_gives_nobody_is_bad_input(tmp_path: Path) -> None:
    done = asked_for("sdxl/a..b", tmp_path)
    assert done.exit_code == 2
    assert "'sdxl/a..b' can't be found (it is no folder, nor a name that the hub allows): the nearest " in done.output


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_a_name_that_isnt_in_the_cache_is_bad_input(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nobody is there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    done = asked_for("segmind/SSD-1b", tmp_path)
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    answer = "OfflineModeIsEnabled" if offline else "Connect"
    assert f"no folder, nor in the hub's local cache, and the hub doesn't answer: {answer}" in done.output
    assert "): the nearest are segmind/SSD-1B" in done.output


def test_what_is_there_and_cant_be_read_is_exit_code_1(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "status", 403)
    monkeypatch.setattr(hub, "code", "GatedRepo")
    done = asked_for("somebody/gated", tmp_path)
    assert done.exit_code == 1
    assert "weights of somebody/gated can't be reached (GatedRepoError): accept their terms" in done.output
    assert "or --model FOLDER loads a local copy." in done.output


@pytest.mark.parametrize(
    ("name", "hub_id"), [("flux-dev", MODELS["flux-dev"].hub_id), ("somebody/gated", "somebody/gated")]
)
def test_gated_weights_that_arent_given_are_exit_code_1_before_anything_starts(
    name: str, hub_id: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "gated", (hub_id,))
    done = asked_for(name, tmp_path)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    terms = "accept their terms on the hub and set HF_TOKEN, or --"
    assert f"weights of {hub_id} can't be reached (GatedRepoError): {terms}" in done.output


def test_a_hub_that_goes_silent_is_waited_for_no_longer_than_was_said(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it told about gated weights, and is asked for whether they are given."""
    told, answer = threading.Event(), hub.do_GET

    def fall_silent(self: Hub) -> None:
        if self.path.endswith("/auth-check"):
            told.wait(10)
        else:
            answer(self)

    monkeypatch.setattr("diffusion_fast.models.HUB_SECONDS", 0.5)
    monkeypatch.setattr(hub, "gated", (MODELS["flux-dev"].hub_id,))
    monkeypatch.setattr(hub, "do_GET", fall_silent)
    try:
        with pytest.raises(WeightsUnreachableError, match=r"FLUX\.1-dev can't be reached \(ReadTimeout\)"):
            check_weights(MODELS["flux-dev"], "pretrained")
    finally:
        told.set()


def test_gated_weights_in_the_cache_are_taken_without_a_question(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, file: file)
    check_weights(MODELS["flux-dev"], "pretrained")
    assert hub.asked_with == []


def test_what_is_half_in_the_cache_is_exit_code_1(sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, cached = sd15 / unlisted.INDEX, unlisted.INDEX
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda _, file: str(index) if file == cached else None
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnreachableError, match=r"somebody/half can't be reached \(OfflineModeIsEnabled\)"):
        plan.find_model("somebody/half")


def test_random_weights_need_an_entry(sd15: Path) -> None:
    done = CliRunner().invoke(main, ("run", "--no-track", "--model", str(sd15), "--weights", "random"))
    assert (done.exit_code, "my sd15 can't be built from random weights" in done.output) == (2, True)


@pytest.mark.full
def test_a_hub_id_in_the_cache_is_measured_offline_and_the_token_stays_a_secret(sd15: Path, tmp_path: Path) -> None:
    """The command line with real workers: of a model that is whole, and of one whose VAE is gone."""
    cached = tmp_path / "hub" / "models--somebody--private"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(sd15, cached / "snapshots" / COMMIT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}
    command = (sys.executable, "-m", "diffusion_fast", "run", "--model", "somebody/private", "--with", "sdpa")
    small = ("--steps", "1", "--height", "64", "--width", "64", "--device", "cpu")
    done = subprocess.run((*command, *small), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = spool.find_ladders(tmp_path / "spool")
    ((_, outcome),) = spool.outcomes(folder)
    assert isinstance(outcome, Result)
    assert (outcome.ckpt_id, outcome.pipeline_cls) == ("somebody/private", "StableDiffusionPipeline")
    assert outcome.identical_to_reference or (outcome.psnr_db or 0) > 60
    assert set(outcome.applied) == {"sdpa"}

    (cached / "snapshots" / COMMIT / "vae" / WEIGHTS_FILE).unlink()
    again = subprocess.run(
        (*command, *small, "--no-track", "--spool", "failed"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 1
    assert list((tmp_path / "failed").glob("*/reference/failure.json"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "result.json", "log.txt"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr + again.stdout + again.stderr
