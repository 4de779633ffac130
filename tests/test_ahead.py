"""What is compiled ahead of time: when a package is made, when it is found again, and whose weights it computes with.

Only one network is really compiled here, the bundled model's UNet. Elsewhere a package is the network itself, which
checks that it is called as it was compiled for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from diffusion_fast import ahead, graphs, onestep, roofline, saved_cache
from diffusion_fast.ahead import AheadOfTime
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, compilation
from diffusion_fast.pipeline import call
from diffusion_fast.plan import Settings, plan_ladder, plan_recipe
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100
from tests.test_graphs import CHANGES, captured, pictures
from tests.test_onestep import recorded_in
from tests.test_optimizations import build

NAMES = ("sdpa", "ahead_of_time")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Compiled:
    """This module's one compilation: a pipeline, the folder of its compile cache, and what it paints."""

    build: Build
    cache: Path
    picture: Any


# --- really compiled -------------------------------------------------------------------------------------------------


@contextmanager
def for_the_unet_alone(cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
        patch.setattr(compilation, "_whole_networks", lambda build: {"unet": build.denoiser})
        patch.setitem(ahead.WEIGHTS_APART, "aot_inductor.compile_wrapper_opt_level", "O0")  # sooner compiled
        yield


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    cache = tmp_path_factory.mktemp("cache")
    with torch.no_grad(), for_the_unet_alone(cache):
        made, _ = build(*NAMES)
        return Compiled(made, cache, call(made)[0])


def difference(one: Any, other: Any) -> int:
    pair = (torch.tensor(list(image.tobytes())) for image in (one, other))
    return int((next(pair) - next(pair)).abs().max())


def other_weights(made: Build) -> Build:
    """A conv_out of its own, whose bias has 4 numbers: those Inductor likes to write into the code."""
    torch.manual_seed(1)
    for name in ("conv_in.weight", "conv_out.weight", "conv_out.bias", "conv_norm_out.weight"):
        parameter = made.denoiser.get_parameter(name)
        parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def test_the_picture_is_that_of_eager(compiled: Compiled) -> None:
    assert difference(compiled.picture, call(build("sdpa")[0])[0]) <= 1
    assert compiled.build.proofs["ahead_of_time"]() == {"graphs": 1, "from_cache": 0, "eager_calls": 0}


def test_later_another_model_of_the_kind_loads_it_and_paints_by_its_own_weights(compiled: Compiled) -> None:
    (package,) = compiled.cache.rglob("*.pt2")
    before = package.read_bytes()
    expected = call(other_weights(build("sdpa")[0]))[0]
    with for_the_unet_alone(compiled.cache):
        made, unchanged = build(*NAMES)[0], build(*NAMES)[0]
        other_weights(made)
        assert difference(call(made)[0], expected) <= 1 < difference(expected, compiled.picture)
        assert made.proofs["ahead_of_time"]() == {"graphs": 1, "from_cache": 1, "eager_calls": 0}
        # The weights are the model's own, not copies: what is changed in place counts.
        assert difference(call(unchanged)[0], compiled.picture) == 0
        assert difference(call(other_weights(unchanged))[0], expected) <= 1
    assert package.read_bytes() == before
    for name in ("conv_out.weight", "mid_block.resnets.0.conv1.weight"):
        assert compiled.build.denoiser.get_parameter(name).numpy().tobytes() not in before


def test_what_was_compiled_goes_through_a_saved_cache(compiled: Compiled, tmp_path: Path) -> None:
    (spec,) = plan_ladder("run", (Recipe("mine", NAMES),), MODELS["tiny"], CPU, Settings()).rungs
    saved_cache.save(spec, compiled.cache, tmp_path / "cache.zip")
    saved_cache.unpack(tmp_path / "cache.zip", tmp_path / "elsewhere" / "cache")
    with for_the_unet_alone(tmp_path / "elsewhere" / "cache"):
        made, _ = build(*NAMES)
        assert difference(call(made)[0], compiled.picture) == 0
    assert made.proofs["ahead_of_time"]()["from_cache"] == 1


def test_layouts_and_places_in_memory_need_no_packages_of_their_own(compiled: Compiled) -> None:
    denoiser, given = compiled.build.denoiser, {}
    hook = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    call(compiled.build)
    hook.remove()
    args, kwargs = given["args"], given["kwargs"]
    expected = denoiser(*args, **kwargs)[0]
    timesteps = torch.stack([torch.zeros_like(args[1]), args[1]])
    assert timesteps[1].data_ptr() % ahead.ALIGNMENT
    last = args[0].to(memory_format=torch.channels_last)
    text = kwargs.pop("encoder_hidden_states").transpose(0, 1).contiguous().transpose(0, 1)
    found = denoiser(last, timesteps[1], **kwargs, encoder_hidden_states=text)[0]  # nor does the order of names
    torch.testing.assert_close(found, expected)
    assert compiled.build.proofs["ahead_of_time"]()["graphs"] == 1


# --- packages that are the network itself ----------------------------------------------------------------------------


class Package:
    def __init__(self, network: Any, file: Path) -> None:
        self.network, self.shapes = network, json.loads(file.read_text())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert shapes(args, kwargs) == self.shapes
        return type(self.network).forward(self.network, *args, **kwargs)


def shapes(args: Any, kwargs: Any) -> list[Any]:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    assert all(tensor.is_contiguous() and tensor.data_ptr() % ahead.ALIGNMENT == 0 for tensor in tensors)
    return [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of packages that nothing was compiled for."""

    def compile_package(network: Any, args: Any, kwargs: Any, options: Any, file: Path) -> None:
        assert network.forward.__func__ is type(network).forward  # what is traced is the network's own
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(shapes(args, kwargs)))

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "compile_package", compile_package)
    monkeypatch.setattr(ahead, "load_package", Package)
    return tmp_path / ahead.FOLDER


def test_whatever_changes_between_calls_each_shape_has_its_package(uncompiled: Path) -> None:
    plain, (made, applied) = build("sdpa")[0], build(*NAMES)
    assert applied["ahead_of_time"]["modules"] == ["unet", "vae.decoder"]
    for change in CHANGES:
        assert pictures(made, **change) == pictures(plain, **change), change
    # UNet and decoder: as planned, another size, a batch of two; and the UNet alone without guidance.
    assert made.proofs["ahead_of_time"]() == {"graphs": 7, "from_cache": 0, "eager_calls": 0}
    assert len(list(uncompiled.iterdir())) == 7
    later, _ = build(*NAMES)
    for change in CHANGES:
        pictures(later, **change)
    assert later.proofs["ahead_of_time"]() == {"graphs": 7, "from_cache": 7, "eager_calls": 0}


def test_a_cuda_graph_captures_the_package(uncompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = build("sdpa")[0], captured(*NAMES, monkeypatch=monkeypatch)
    assert pictures(made) == pictures(plain)
    assert pictures(made, batch_size=2) == pictures(plain, batch_size=2)
    assert made.proofs["ahead_of_time"]()["graphs"] == 4
    account = made.proofs["cuda_graph"]()
    assert account["unet step"] == {"captures": 2, "replays": 4, "eager_calls": 0}
    assert account["vae.decoder"]["captures"] == 2


def test_operations_are_counted_and_steps_replayed_as_ever(uncompiled: Path) -> None:
    plain, (made, _) = build("sdpa")[0], build(*NAMES)
    call(made)
    assert roofline.count_flops(replace(made, spec=replace(made.spec, batch_size=2))) == roofline.count_flops(
        replace(plain, spec=replace(plain.spec, batch_size=2))
    )
    steps = recorded_in(plain, set())
    other = [step | {"args": (torch.cat([step["args"][0]] * 2), *step["args"][1:])} for step in steps]
    with pytest.raises(RuntimeError, match="unet would have to be compiled for other arguments"):
        onestep.replay(made, other)
    for found, step in zip(onestep.replay(made, steps), steps, strict=True):
        assert torch.equal(found, step["output"])
    assert made.proofs["ahead_of_time"]() == {"graphs": 2, "from_cache": 0, "eager_calls": 0}


def test_a_number_among_the_arguments_is_not_compiled_in(uncompiled: Path) -> None:
    made, _ = build(*NAMES)
    added = {"text_embeds": torch.rand(2, 256), "time_ids": torch.ones(2, 6)}
    wide = made.denoiser.add_embedding.linear_1.in_features - 6 * made.denoiser.config.addition_time_embed_dim
    given: dict[str, Any] = {"added_cond_kwargs": added | {"text_embeds": torch.rand(2, wide)}, "return_dict": False}
    sample, text = torch.rand(2, 4, 12, 12), torch.rand(2, 77, made.denoiser.config.cross_attention_dim)
    with pytest.warns(UserWarning, match="unet was called with a number: this call is computed without a package") as w:
        for step in (7, 8):
            made.denoiser(sample, step, text, **given)
    assert len(w) == 1
    assert not uncompiled.exists()
    with pytest.raises(RuntimeError, match=r"nothing was compiled or loaded of unet, vae\.decoder"):
        made.proofs["ahead_of_time"]()


class Doubling(torch.nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x: torch.Tensor, *, times: torch.Tensor | None = None) -> torch.Tensor:
        return x * self.factor.sum() * (1 if times is None else times)


def doubling(folder: Path, network: torch.nn.Module | None = None, **options: Any) -> AheadOfTime:
    return AheadOfTime("doubling", network or Doubling(), folder, options)


def test_past_the_most_shapes_it_computes_without_a_package_and_warns_once(uncompiled: Path) -> None:
    twice = doubling(uncompiled)
    for size in range(ahead.MOST):
        twice(torch.ones(size))
    with pytest.warns(UserWarning, match="doubling was compiled for 16 shapes already") as warned:
        for _ in range(3):
            assert twice(torch.ones(100)).tolist() == [6.0] * 100
    assert len(warned) == 1
    assert twice.account() == {"graphs": 16, "from_cache": 0, "eager_calls": 3}


def test_within_none_the_network_itself_is_called(uncompiled: Path) -> None:
    twice = doubling(uncompiled)
    with graphs.none():
        assert twice(torch.ones(2)).tolist() == [6.0, 6.0]
    assert twice.account() == {"graphs": 0, "from_cache": 0, "eager_calls": 0}


def test_a_package_is_found_by_all_that_it_depends_on(uncompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(3)

    def is_found(made: AheadOfTime, *args: Any, **kwargs: Any) -> bool:
        made(*args, **kwargs)
        return bool(made.from_cache)

    assert not is_found(doubling(uncompiled), one)
    assert is_found(doubling(uncompiled), one)
    changed = Doubling()
    changed.factor.mul_(5)
    assert is_found(doubling(uncompiled, changed), one)  # weights are apart
    assert not is_found(doubling(uncompiled), torch.ones(4))
    assert not is_found(doubling(uncompiled), one.double())
    assert not is_found(doubling(uncompiled), one, times=one)
    assert not is_found(doubling(uncompiled, max_autotune=True), one)
    assert not is_found(doubling(uncompiled, Doubling(4)), one)
    assert not is_found(doubling(uncompiled, Doubling().double()), one)
    assert not is_found(doubling(uncompiled, Doubling().eval()), one)
    assert not is_found(AheadOfTime("doubling", Doubling(), uncompiled, {}, made_by=("fused_qkv",)), one)
    attending = Doubling()
    attending.processor = Package  # type: ignore[assignment]
    assert not is_found(doubling(uncompiled, attending), one)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not is_found(doubling(uncompiled), one)
    for name, value in {"version": lambda name: "0", "_sources": lambda: "other"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(ahead, name, value)
            assert not is_found(doubling(uncompiled), one), name
    with torch.compiler.config.patch(cache_key_tag="other"):
        assert not is_found(doubling(uncompiled), one)
    with torch._inductor.config.patch(epilogue_fusion=False):
        assert not is_found(doubling(uncompiled), one)
    # What a compilation notes for itself is no reason to compile again.
    monkeypatch.setattr(torch._inductor.config.aot_inductor, "metadata", {"AOTI_DEVICE_KEY": "cpu"})
    assert is_found(doubling(uncompiled), one)


# --- constants -------------------------------------------------------------------------------------------------------


class Loaded:
    """What torch loads, without anything in it."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def get_constant_fqns(self) -> list[str]:
        return list(self.names)

    def load_constants(self, found: dict[str, Any], *, check_full_update: bool, user_managed: bool) -> None:
        assert check_full_update
        assert user_managed
        self.found = found


def test_tensors_that_are_no_weights_are_kept_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, own, file = Doubling(), torch.tensor([4.0]), tmp_path / "folder" / "name.pt2"

    def aot_compile(module: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> list[Any]:
        assert not options["aot_inductor.package_constants_in_so"]
        weights = torch.export.pt2_archive._package_weights
        code = Path(options["aot_inductor.output_path"], "code.so")
        code.touch()
        tensors = {"factor": network.factor, "_tensor_constant0": own}
        return [str(code), weights.Weights({n: (t, weights.TensorProperties(t)) for n, t in tensors.items()})]

    monkeypatch.setattr(torch._inductor, "aot_compile", aot_compile)
    ahead.compile_package(network, (torch.ones(3),), {}, dict(ahead.WEIGHTS_APART), file)
    assert {path.name for path in file.parent.iterdir()} == {"name.pt2", "name.constants"}
    assert torch.load(ahead._constants_of(file)) == {"_tensor_constant0": own}
    loaded = Loaded("factor", "_tensor_constant0")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path, **_: loaded)
    ahead.load_package(network, file)
    assert loaded.found["factor"].data_ptr() == network.factor.data_ptr()
    assert loaded.found["_tensor_constant0"] == own
    loaded.names = ("factor", "bias")
    with pytest.raises(RuntimeError, match=r"name\.pt2 needs bias, which the network doesn't have"):
        ahead.load_package(network, file)


def test_weights_that_would_stay_in_the_package_are_refused(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    network = torch.nn.Sequential(torch.nn.Linear(16, 16))
    quantize_(network, Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(RuntimeError, match=r"0\.weight is no plain tensor"):
        AheadOfTime("linear", network, tmp_path, {})(torch.rand(2, 16))
    assert list(tmp_path.iterdir()) == []


def test_a_compilation_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    twice = doubling(tmp_path)
    with pytest.raises(RuntimeError, match="no compiler"):
        twice(torch.ones(3))
    assert list(tmp_path.iterdir()) == []


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("compile",), "exclude each other"),
        (("regional_compile",), "exclude each other"),
        (("feature_reuse",), "exclude each other"),
        (("feature_forecast",), "exclude each other"),
        (("inductor_tuning",), "requires compile or regional_compile"),
        (("bf16", "int8_dynamic"), "requires compile or regional_compile"),
    ],
)
def test_what_it_can_not_go_with_is_refused(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_recipe(MODELS["tiny"], Recipe("mine", (*NAMES, *names)), CPU)


def test_eight_bits_of_our_own_go_with_it() -> None:
    recipe = Recipe("mine", ("bf16", "channels_last", *NAMES, "fp8_rows", "fp8_convolutions"))
    assert plan_recipe(MODELS["tiny"], recipe, H100)[-3:] == ("fp8_rows", "fp8_convolutions", "ahead_of_time")


def test_its_modes_capture_no_graphs_and_one_that_does_is_refused() -> None:
    recipe = Recipe("mine", ("bf16", *NAMES, "cuda_graph"))
    (spec,) = plan_ladder("run", (recipe,), MODELS["tiny"], H100, Settings()).rungs
    assert spec.compile_mode == "default"
    assert spec.optimizations == ("bf16", *NAMES, "cuda_graph")
    with pytest.raises(ValueError, match="ahead_of_time excludes compile mode max-autotune"):
        plan_ladder("run", (Recipe("mine", NAMES),), MODELS["tiny"], H100, Settings(compile_mode="max-autotune"))


def test_it_takes_no_adapter_afterwards(uncompiled: Path) -> None:
    made, _ = build(*NAMES)
    with pytest.raises(RuntimeError, match="ahead_of_time can't take an adapter any more"):
        made.denoiser.add_adapter(None)
    assert not OPTIMIZATIONS["ahead_of_time"].takes_adapters
