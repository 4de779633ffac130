"""The training script runs, goes on where it was stopped, and leaves a model of the size that ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from diffusion_fast import tracking, world
from diffusion_fast.cli import main
from tests import conftest


@pytest.fixture(scope="module")
def script() -> ModuleType:
    module = conftest.script("train_tiny")
    module.TINY = replace(module.TINY, steps=3)  # what was hardly trained paints nothing, in 30 steps neither
    return module


@pytest.fixture(scope="module")
def trained(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    script.train(script.SMOKE, folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "model").glob("*/*.safetensors")):
        found |= {f"{path.parent.name}.{name}": value for name, value in load_file(path).items()}
    return found


def test_it_leaves_a_pipeline_its_curves_and_its_judgement(trained: Path) -> None:
    index = json.loads((trained / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} >= {
        "vae_loss",
        "vae_kl",
        "loss",
        "trained_s",
        "vae_right",
        "prompt_accuracy",
    }
    assert all(line["value"] == line["value"] for line in lines)  # none is NaN
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert [each["prompt"] for each in evaluation["painted"]] == list(world.held_out_prompts(2))
    facts = json.loads((trained / "training.json").read_text())
    assert facts["plan"]["steps"] == 4
    assert facts["accuracy"]["prompts"] == 2
    assert (trained / "sheet.jpg").is_file()


@pytest.mark.usefixtures("store")
def test_its_folder_becomes_a_run_with_its_curves_once(trained: Path) -> None:
    for _ in range(2):
        done = CliRunner().invoke(main, ["sync", str(trained)], catch_exceptions=False)
        assert (done.exit_code, trained.name in done.output) == (0, True)
    client = tracking.connect(None)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.tags["kind"], run.data.params["steps"]) == ("FINISHED", "training", "4")
    assert [each.step for each in client.get_metric_history(run.info.run_id, "loss")] == [0, 3]
    assert [each.step for each in client.get_metric_history(run.info.run_id, "prompt_accuracy")] == [2, 4]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files >= {"sheet.jpg", "evaluation.json", "training.json", "metrics.jsonl", "samples", "images"}
    assert not files & {"checkpoint.pt", "model"}


def test_it_is_small_and_its_weights_were_trained(trained: Path, script: ModuleType) -> None:
    files = [path for path in (trained / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    found = weights(trained)
    assert {value.dtype for value in found.values()} <= {torch.float16, torch.int64}
    assert all(value.isfinite().all() for value in found.values())
    untrained = script.new_pipeline(script.SMOKE)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        network = getattr(untrained, name).half()
        same = {
            key
            for key, value in network.state_dict().items()
            if f"{name}.{key}" in found and torch.equal(found[f"{name}.{key}"], value)
        }
        # Nothing reads what the first encoder's last layer makes, in SDXL's pipeline neither, and a softmax over keys
        # doesn't see what is added to all of them.
        unread = (
            "to_k.bias",
            "k_proj.bias",
            *(("encoder.layers.2.", "final_layer_norm.") if name == "text_encoder" else ()),
        )
        assert [key for key in same if not any(part in key for part in unread)] == []
    mean = json.loads((trained / "model" / "vae" / "config.json").read_text())["latents_mean"]
    assert len(mean) == 4 and any(mean)


def test_stopped_and_started_again_it_makes_the_same_model(
    script: ModuleType, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = script.Log.__call__

    def stop(self: Any, step: int, **values: float) -> None:
        log(self, step, **values)
        if step == 3 and "loss" in values:  # the checkpoint was written after step 1
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Log, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        script.train(script.SMOKE, tmp_path)
    monkeypatch.setattr(script.Log, "__call__", log)
    script.train(script.SMOKE, tmp_path)
    straight, resumed = weights(trained), weights(tmp_path)
    assert straight.keys() == resumed.keys()
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


def test_another_plans_checkpoint_is_refused(script: ModuleType, trained: Path) -> None:
    with pytest.raises(SystemExit, match="another plan"):
        script.train(replace(script.SMOKE, seed=1), trained)


def test_no_norm_takes_the_colours_out_of_a_picture(script: ModuleType) -> None:
    pipe = script.new_pipeline(script.SMOKE)
    for network in (pipe.unet, pipe.vae):
        norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
        assert norms and all(norm.num_channels >= 4 * norm.num_groups for norm in norms)


def test_text_is_encoded_as_the_pipeline_encodes_it(script: ModuleType) -> None:
    pipe = script.new_pipeline(script.SMOKE)
    prompts = list(world.held_out_prompts(3))
    with torch.no_grad():
        context, pooled = script.encode_text(
            pipe.text_encoder, pipe.text_encoder_2, script.tokens(pipe.tokenizer, prompts)
        )
        said, unsaid, pooled_said, pooled_unsaid = pipe.encode_prompt(prompts, device="cpu")
    assert torch.equal(context, said)
    assert torch.equal(pooled, pooled_said)
    assert not unsaid.any() and not pooled_unsaid.any()  # as the training drops captions
    assert pipe.text_encoder.config.eos_token_id != 2  # with which transformers would look for the highest id


def test_a_perfect_velocity_leads_the_scheduler_to_the_clean_latents(script: ModuleType) -> None:
    scheduler = script.new_pipeline(script.SMOKE).scheduler
    clean = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(30)
    signal = scheduler.alphas_cumprod
    latents = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        share = signal[int(timestep)].expand(2)
        noise = (seen - share.sqrt().view(-1, 1, 1, 1) * clean) / (1 - share).sqrt().view(-1, 1, 1, 1)
        again, velocity = script.noised(clean, noise, share)
        assert torch.allclose(again, seen, atol=1e-5)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    assert torch.allclose(latents, clean, atol=1e-4)


def test_every_word_is_a_token_and_every_caption_fits(script: ModuleType) -> None:
    words = script.tokenizer()
    assert words.get_vocab() == script.tokenizer().get_vocab()  # learned the same way every time
    random = Random(3)
    captions = [world.caption(world.random_scene(random), random) for _ in range(500)]
    for text in captions:
        assert words.tokenize(text) == text.replace(",", " ,</w>").split()
    ids = script.tokens(words, captions)
    assert ids.shape == (500, 77)
    assert (ids == words.eos_token_id).any(1).all()
    assert len(words.tokenize("castles")) > 1  # what the world doesn't know is spelled
