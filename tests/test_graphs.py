"""What a graph's recording does to the calls around it, with recordings that a CPU can make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from peft import LoraConfig
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_fast import graphs
from diffusion_fast.graphs import Graphed
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, compilation
from diffusion_fast.pipeline import _from_configs, call
from tests.conftest import planned
from tests.test_optimizations import build


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def record(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As a CUDA graph: a replay computes anew from whatever the same inputs hold, into the same outputs."""
    outputs = function()

    def replay() -> None:
        filled = pytree.tree_leaves(outputs)
        for old, new in zip(filled, pytree.tree_leaves(function()), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)

    return replay, outputs


def double(tensor: torch.Tensor, *, factor: int = 2) -> dict[str, torch.Tensor]:
    return {"it": tensor * factor}


def test_a_replay_computes_from_what_it_is_given_now() -> None:
    graphed = Graphed("double", double, "cpu", record)
    assert graphed(torch.tensor([1.0, 2.0]))["it"].tolist() == [2.0, 4.0]
    assert graphed(torch.tensor([5.0, 7.0]))["it"].tolist() == [10.0, 14.0]
    assert graphed.account() == {"captures": 1, "replays": 2, "eager_calls": 0}


def test_what_was_returned_is_not_changed_by_the_next_replay() -> None:
    graphed = Graphed("double", double, "cpu", record)
    first = graphed(torch.tensor([1.0]))["it"]
    graphed(torch.tensor([9.0]))
    assert first.tolist() == [2.0]


def test_other_shapes_dtypes_and_values_are_captured_by_themselves_and_once() -> None:
    graphed = Graphed("double", double, "cpu", record)
    for _ in range(2):
        assert graphed(torch.ones(3))["it"].tolist() == [2.0] * 3
        assert graphed(torch.ones(3, dtype=torch.float64))["it"].dtype == torch.float64
        assert graphed(torch.ones(1, 3))["it"].shape == (1, 3)
        assert graphed(torch.ones(3), factor=5)["it"].tolist() == [5.0] * 3
    assert graphed.account() == {"captures": 4, "replays": 8, "eager_calls": 0}


def test_strides_are_the_first_callers() -> None:
    graphed = Graphed("double", double, "cpu", record)
    image = torch.rand(2, 3, 4, 5)
    graphed(image)
    assert torch.equal(graphed(image.to(memory_format=torch.channels_last))["it"], image * 2)
    assert graphed.captures == 1


def test_past_the_most_shapes_it_computes_without_a_graph_and_warns_once() -> None:
    graphed = Graphed("double", double, "cpu", record)
    for size in range(graphs.MOST):
        graphed(torch.ones(size))
    with pytest.warns(UserWarning, match="double was captured in 16 shapes already") as warned:
        for _ in range(3):
            assert graphed(torch.ones(100))["it"].tolist() == [2.0] * 100
    assert len(warned) == 1
    assert graphed.account() == {"captures": 16, "replays": 16, "eager_calls": 3}


def test_what_else_a_recording_depends_on_is_part_of_its_key() -> None:
    strength = [1.0]
    graphed = Graphed("double", lambda x: x * strength[0], "cpu", record, state=lambda: strength[0])
    assert graphed(torch.ones(1)).item() == 1.0
    strength[0] = 3.0
    assert graphed(torch.ones(1)).item() == 3.0
    assert graphed.captures == 2


def test_within_none_nothing_is_captured_or_replayed() -> None:
    graphed = Graphed("double", double, "cpu", record)
    with graphs.none():
        assert graphed(torch.ones(2))["it"].tolist() == [2.0, 2.0]
    assert graphed.account() == {"captures": 0, "replays": 0, "eager_calls": 0}
    graphed(torch.ones(2))
    assert graphed.replays == 1


def captured(*names: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Build:
    """cuda_graph as it is on a GPU, but for the recordings."""
    monkeypatch.setattr(graphs, "record_on_gpu", record)
    made, _ = build(*names, **changes)
    compilation.cuda_graph(made)
    return made


def pictures(made: Build, **changes: Any) -> bytes:
    return b"".join(image.tobytes() for image in call(replace(made, spec=replace(made.spec, **changes))))


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"height": 64, "width": 96},
    {"batch_size": 2},
    {"prompt": "a small blue star"},
    {"prompt": " and ".join(["a large green ring"] * 5)},
    {"guidance_scale": 1.0},
    {"guidance_scale": 7.0},
    {"steps": 3},
    {"seed": 5},
    {},
)


def test_whatever_changes_between_calls_the_pixels_are_those_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = build("sdpa")[0], captured("sdpa", monkeypatch=monkeypatch)
    for change in CHANGES:
        assert pictures(made, **change) == pictures(plain, **change), change
    # DPM-Solver and PNDM use what the denoiser gave in steps before: a graph's outputs would have been overwritten.
    for scheduler in (DPMSolverMultistepScheduler, PNDMScheduler):
        for each in (plain, made):
            each.pipe.scheduler = scheduler.from_config(each.pipe.scheduler.config)
        assert pictures(made, steps=6) == pictures(plain, steps=6), scheduler
    account = made.proofs["cuda_graph"]()
    # As planned, another size, a batch of two, no guidance, and the integer time steps of the other schedulers.
    assert account["unet step"]["captures"] == 5
    assert account["unet step"]["eager_calls"] == 0
    assert account["vae.decoder"]["captures"] == 3
    assert set(account) == {"unet step", "text_encoder", "text_encoder_2", "vae.decoder"}


def test_an_adapter_that_comes_later_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = build("sdpa")[0], captured("sdpa", monkeypatch=monkeypatch)
    before = pictures(made)
    for each in (plain, made):
        torch.manual_seed(0)
        each.denoiser.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_adapter = pictures(made)
    assert with_adapter == pictures(plain) != before
    for each in (plain, made):
        each.denoiser.disable_adapters()
    assert pictures(made) == before
    assert made.proofs["cuda_graph"]()["unet step"]["captures"] == 3
    for each in (plain, made):
        each.denoiser.enable_adapters()
    assert pictures(made) == with_adapter
    weaker = {"cross_attention_kwargs": {"scale": 0.25}}  # of the adapter, for one call
    for each in (plain, made):
        each.call_arguments = weaker
    assert pictures(made) == pictures(plain) != with_adapter


class Host(TorchDispatchMode):
    """Notes what would make the device wait for the host, or copy from it: values that are asked for, other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors) or any(
            name in str(function) for name in ("_local_scalar_dense", "nonzero")
        ):
            self.seen.append(str(function))
        return out


def test_nothing_that_is_captured_of_sdxl_needs_the_host() -> None:
    """At full size, on the device without memory: a capture would fail at the first of these."""
    spec = replace(planned(model="sdxl", weights="random").rungs[0], device="meta")  # type: ignore[arg-type]
    made = Build(MODELS["sdxl"], spec)
    made.pipe = _from_configs(made)
    for name in ("sdpa", "channels_last", "no_layout_copies", "fused_qkv", "group_norm_kernels", "feature_forecast"):
        OPTIMIZATIONS[name].apply(made)

    def tensor(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=of, device="meta")

    step = tensor(2, 4, 128, 128), tensor(), tensor(2, 77, 2048)
    added = {"text_embeds": tensor(2, 1280), "time_ids": tensor(2, 6)}
    given: dict[str, tuple[Any, ...]] = {
        "text_encoder": (tensor(1, 77, of=torch.long),),
        "text_encoder_2": (tensor(1, 77, of=torch.long),),
        "unet full": (*step, added, None, None),
        "unet shallow": (*step, added, None, tensor(2, 640, 128, 128)),
        "vae.decoder": (tensor(1, 4, 128, 128),),
    }
    launched = {name: getattr(owner, attribute) for name, owner, attribute in made.launched()}
    assert set(launched) == set(given)
    for name, arguments in given.items():
        with Host() as host:
            launched[name](*arguments)
        assert host.seen == [], name


def test_a_network_that_was_never_replayed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captured(monkeypatch=monkeypatch)
    with pytest.raises(RuntimeError, match="nothing was replayed of unet step, text_encoder"):
        made.proofs["cuda_graph"]()
