"""Compiling ahead of the coordinate descent: the descent is torch's own, its kernels and its workers are fakes."""

from __future__ import annotations

import functools
import os
import pickle
import threading
import types
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch._inductor import async_compile
from torch._inductor.runtime.autotune_cache import AutotuneCache
from torch._inductor.runtime.coordinate_descent_tuner import CoordescTuner
from torch._inductor.runtime.hints import HeuristicType, ReductionHint
from torch._inductor.runtime.runtime_utils import triton_config_to_hashable as key_of
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.virtualized import V

from diffusion_fast import inductor


class Config:
    """triton.Config, for what the tuner reads of it: Triton isn't installed on a CPU."""

    def __init__(self, num_warps: int = 4, num_stages: int = 1, **kwargs: int):
        self.kwargs, self.num_warps, self.num_stages = kwargs, num_warps, num_stages

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As triton.Config's: what else was set on it is gone."""
        self.kwargs, self.num_warps, self.num_stages = state["kwargs"], state["num_warps"], state["num_stages"]


KERNELS = {
    "pointwise": (Config(XBLOCK=256), {"x": 2**22}),
    "tiled": (Config(XBLOCK=32, YBLOCK=32), {"x": 4096, "y": 512}),
    "reduction": (Config(XBLOCK=1, R0_BLOCK=1024), {"x": 64, "r0_": 4096}),
    "small": (Config(XBLOCK=1, num_warps=1), {"x": 1}),
    "split": (Config(XBLOCK=1, NUM_STAGES=2, RSPLIT_SIZE=2), {"x": 4096, "r0_": 512}),
}


def a_tuner(kernel: str, all_directions: bool = True) -> CoordescTuner:
    meta = {"warp_size": 32, "max_threads_per_block": 1024}
    meta["coordinate_descent_check_all_directions"] = all_directions
    split = "RSPLIT_SIZE" in KERNELS[kernel][0].kwargs
    return CoordescTuner(is_mix_order_reduction=split, size_hints=KERNELS[kernel][1], inductor_meta=meta)


def milliseconds(config: Any) -> float:
    """A landscape with its optimum some steps, some of them diagonal, from where the descents start."""
    if config.num_warps == 16:
        raise RuntimeError("out of resources")
    wanted = {"XBLOCK": 64, "YBLOCK": 8, "R0_BLOCK": 2048, "num_warps": 8}
    found = config.kwargs | {"num_warps": config.num_warps}
    off = [max(wanted[name] / found[name], found[name] / wanted[name]) for name in wanted if name in found]
    return 1 + max(off) + 0.01 * sum(off)


class Autotuner(CachingAutotuner):  # type: ignore[misc]
    """Inductor's own, up to compiling and benchmarking."""

    def __init__(self, kernel: str):
        self.coordesc_tuner = a_tuner(kernel)
        self.size_hints = KERNELS[kernel][1]
        self.fn = types.SimpleNamespace(fn=print, src="", __name__="triton_fake")
        self.filename: str | None = "/cache/fake.py"
        self.lock, self.heuristic_type, self.save_cache_hook = threading.Lock(), HeuristicType.POINTWISE, None
        self.autotune_time_taken_ns = 0
        self.compiled: list[Any] = []

    def _precompile_config(self, cfg: Any) -> Any:
        self.compiled.append(key_of(cfg))
        launcher = types.SimpleNamespace(config=cfg, n_regs=0, n_spills=0, shared=0, cache_hash="")
        return types.SimpleNamespace(make_launcher=lambda: launcher)

    def bench(self, launcher: Any, *args: Any, **kwargs: Any) -> float:
        return milliseconds(launcher.config)


class Workers:
    """A pool that notes what it was given, and fails as told: at the door, in the job, or by never answering."""

    def __init__(self, trouble: str = ""):
        self.trouble = trouble
        self.given: list[Any] = []

    def submit(self, job: Any, config: Any) -> Future[None]:
        if self.trouble == "closed":
            raise RuntimeError("Attempting to use a closed pool")
        pickle.dumps(functools.partial(job, config))
        self.given.append(key_of(config))
        future: Future[None] = Future()
        if self.trouble == "failing":
            future.set_exception(RuntimeError("in a worker:\nTraceback\nValueError: numel too large"))
        elif self.trouble != "silent":
            future.set_result(None)
        return future


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install it, with the given fake workers, for one test."""

    def with_workers(workers: Workers, threads: int = 16) -> inductor.Prefetch:
        monkeypatch.setattr(async_compile.AsyncCompile, "use_process_pool", lambda: True)
        monkeypatch.setattr(async_compile.AsyncCompile, "process_pool", lambda: workers)
        monkeypatch.setattr(async_compile, "get_compile_threads", lambda: threads)
        for part in ("_coordinate_descent_tuning", "precompile"):
            monkeypatch.setattr(CachingAutotuner, part, getattr(CachingAutotuner, part))
        inductor.parallel_coordinate_descent.cache_clear()
        return inductor.parallel_coordinate_descent()

    yield with_workers
    inductor.parallel_coordinate_descent.cache_clear()


def descend(kernel: str) -> tuple[list[Any], Any]:
    """What was compiled, in order, and what was chosen."""
    autotuner = Autotuner(kernel)
    start = types.SimpleNamespace(config=KERNELS[kernel][0])
    best = autotuner._coordinate_descent_tuning(start).config
    assert "compare_config" not in vars(autotuner.coordesc_tuner)
    return autotuner.compiled, key_of(best)


@pytest.mark.parametrize("all_directions", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_next_candidates_are_those_of_a_real_round(kernel: str, all_directions: bool) -> None:
    best, tuner = KERNELS[kernel][0], a_tuner(kernel, all_directions)
    tuner.cache_benchmark_result(best, 1.0)
    expected = inductor.next_candidates(tuner, best)
    again = inductor.next_candidates(tuner, best)
    tried: list[Any] = []
    tuner.autotune(lambda config: tried.append(key_of(config)) or 2.0, best, 1.0)
    assert [key for key, _ in expected] == [key for key, _ in again] == tried  # asking changed nothing
    assert all(key == key_of(config) for key, config in expected)
    assert inductor.next_candidates(tuner, best) == []  # all is benchmarked by now


@pytest.mark.parametrize("threads", [2, 16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_descent_is_the_same_and_finds_everything_compiled(install: Any, kernel: str, threads: int) -> None:
    stock = descend(kernel)
    workers = Workers()
    account = install(workers, threads)
    assert descend(kernel) == stock
    assert set(stock[0]) - {key_of(KERNELS[kernel][0])} <= set(workers.given)
    assert len(workers.given) == len(set(workers.given)) == account.candidates
    assert (account.kernels, account.failed, account.error, account.given_up) == (1, 0, "", False)


def test_nothing_is_given_before_the_descent_needs_it(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workers, events = Workers(), []
    install(workers, threads=4)
    compile_one, submit = Autotuner._precompile_config, workers.submit
    monkeypatch.setattr(workers, "submit", lambda job, config: (events.append("sent"), submit(job, config))[1])

    def precompile(autotuner: Autotuner, config: Any) -> Any:
        events.append("needed" if key_of(config) in workers.given else "start")
        return compile_one(autotuner, config)

    monkeypatch.setattr(Autotuner, "_precompile_config", precompile)
    descend("tiled")
    assert events[:6] == ["start", "sent", "sent", "sent", "sent", "needed"]
    assert max(len(run) for run in " ".join(events).replace("start", "needed").split("needed")) <= len(" sent" * 4) + 1


@pytest.mark.parametrize("trouble", ["closed", "failing", "silent"])
def test_trouble_with_the_workers_leaves_the_descent_alone(
    install: Any, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(inductor, "PATIENCE_S", 0.01)
    stock = descend("tiled")
    workers = Workers(trouble)
    account = install(workers)
    assert descend("tiled") == stock
    assert account.failed == account.candidates == len(workers.given)
    said = {"closed": "closed pool", "failing": "ValueError: numel too large", "silent": "16 candidates not compiled"}
    assert said[trouble] in account.error
    assert account.given_up == (trouble == "silent")
    if account.given_up:
        assert account.candidates == 16  # asked once, never again


def test_an_error_in_the_search_itself_reaches_nobody(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = descend("reduction")
    account = install(Workers())
    monkeypatch.setattr(inductor, "next_candidates", lambda *_: 1 / 0)
    assert descend("reduction") == stock
    assert (account.candidates, account.error) == (0, "ZeroDivisionError: division by zero")


def test_without_a_file_or_workers_nothing_is_sent(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = descend("pointwise")
    account = install(Workers("closed"))
    monkeypatch.setattr(async_compile.AsyncCompile, "use_process_pool", lambda: False)
    assert descend("pointwise") == stock
    assert (account.kernels, account.candidates, account.error) == (1, 0, "")


def test_installing_twice_is_installing_once(install: Any) -> None:
    workers = Workers()
    account = install(workers)
    installed = CachingAutotuner._coordinate_descent_tuning
    assert inductor.parallel_coordinate_descent() is account
    assert CachingAutotuner._coordinate_descent_tuning is installed


@pytest.mark.parametrize("part", ["_coordinate_descent_tuning", "precompile"])
def test_a_torch_without_these_parts_is_left_alone(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.delattr(CachingAutotuner, part)
    inductor.parallel_coordinate_descent.cache_clear()
    account = inductor.parallel_coordinate_descent()
    inductor.parallel_coordinate_descent.cache_clear()
    assert account.given_up
    assert part in account.error


def test_the_job_compiles_a_config_of_the_kernel_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "cabc.py"
    source.write_text("class Kernel:\n    done = []\n    _precompile_config = done.append\ntriton_fake = Kernel\n")
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    job = functools.partial(inductor.compile_candidate, {"TRITON_CACHE_DIR": str(tmp_path)}, str(source), "triton_fake")
    for warps in (2, 4):
        pickle.loads(pickle.dumps(functools.partial(job, Config(warps))))()
    assert [config.num_warps for config in inductor._kernel(str(source), "triton_fake").done] == [2, 4]
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


class Restarted(Autotuner):
    """As it comes back from a worker, with these configs compiled and Inductor's cache to save another in."""

    def __init__(self, cache: AutotuneCache | None, *configs: Config):
        super().__init__("pointwise")
        self.inductor_meta: dict[str, Any] = {}
        self.save_cache_hook = pickle.loads(pickle.dumps(cache.save)) if cache else None
        self.compile_results = [types.SimpleNamespace(config=each) for each in pickle.loads(pickle.dumps(configs))]
        self.configs, self.launchers, self._plugins = None, [], []  # type: ignore[assignment]

    def _precompile_worker(self) -> None:
        self.compile_results = self.compile_results or [types.SimpleNamespace(config=each) for each in self.configs]

    def _make_launchers(self) -> None:
        self.launchers = [types.SimpleNamespace(config=each.config) for each in self.compile_results]

    def _dynamic_scale_rblock(self) -> None:
        if self.inductor_meta.get("dynamic_scale_rblock", True):
            self.compile_results.append(types.SimpleNamespace(config=Config(XBLOCK=1)))
            self._make_launchers()


@pytest.fixture
def cache(tmp_path: Path) -> AutotuneCache:
    """Inductor's own, in a file."""
    return AutotuneCache.create({"autotune_local_cache": True}, str(tmp_path / "cabc.py"), "hash of the configs")


@pytest.mark.parametrize("installed", [False, True])
def test_what_an_earlier_descent_found_is_taken(install: Any, cache: AutotuneCache, installed: bool) -> None:
    """Not installed, it isn't: else this could go."""
    account = install(Workers()) if installed else inductor.Prefetch()
    best = Config(XBLOCK=64, num_warps=8)
    cache.save(best, 0, found_by_coordesc=True)
    best.found_by_coordesc = True  # type: ignore[attr-defined]  # what a worker does, and the pickle loses
    autotuner = Restarted(cache, best)
    for _ in range(2):
        autotuner.precompile()
    assert [hasattr(each.config, "found_by_coordesc") for each in autotuner.launchers] == (
        [True] if installed else [False] * 3
    )
    assert (account.found, account.error) == (int(installed), "")


def test_what_was_marked_and_is_compiled_here_stays_the_only_one(install: Any, cache: AutotuneCache) -> None:
    account = install(Workers())
    autotuner = Restarted(cache)
    best = Config(XBLOCK=64)
    best.found_by_coordesc = True  # type: ignore[attr-defined]
    autotuner.configs = [best]
    autotuner.precompile()
    assert [each.config for each in autotuner.launchers] == [best]
    assert (account.found, account.error) == (0, "")


@pytest.mark.parametrize(
    "case", ["nothing saved", "no cache", "tuned, not found", "another config", "another kernel", "several", "broken"]
)
def test_what_no_descent_found_is_searched_for(
    install: Any, cache: AutotuneCache, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    account = install(Workers())
    best = Config(XBLOCK=64, num_warps=8)
    if case != "nothing saved":
        compiled = "hash of what was compiled" if case == "tuned, not found" else None
        cache.save(best, 0, found_by_coordesc=True, triton_cache_hash=compiled)
    if case == "another kernel":
        cache.configs_hash = "hash of others"
    if case == "broken":
        monkeypatch.setattr(AutotuneCache, "_read", lambda *_: 1 / 0)
    configs = {"another config": [Config(XBLOCK=32)], "several": [best, Config(XBLOCK=32)]}.get(case, [best])
    autotuner = Restarted(None if case == "no cache" else cache, *configs)
    autotuner.precompile()
    assert not any(hasattr(each.config, "found_by_coordesc") for each in autotuner.launchers)
    assert len(autotuner.launchers) == len(configs) + 1  # with what Inductor adds
    assert account.found == 0
    assert bool(account.error) == (case == "broken")


@torch.compiler.config.patch(cache_key_tag="attention")
def test_rows_that_inductor_would_read_twice_are_kept() -> None:
    """Long rows, of numbers beside each other. What Inductor keeps it goes on to keep, and columns are its own."""
    sizes = types.SimpleNamespace(statically_known_leq=lambda size, most: size <= most)

    def kept(hint: ReductionHint, length: int, cooperative: bool = False) -> bool:
        features = types.SimpleNamespace(
            get_reduction_hint=lambda: hint, reduction_numel=sympy.Integer(length), numel=sympy.Integer(64)
        )
        return bool(V.choices.should_use_persistent_reduction(features, cooperative))

    cases = [(hint, length) for hint in ReductionHint for length in (16, 640, 1024, 1280, 4096, 4097)]
    with V.set_graph_handler(types.SimpleNamespace(sizevars=sizes)), V.set_choices_handler(V.choices):
        before = {case for case in cases if kept(*case)}
        assert (ReductionHint.INNER, 1024) in before and (ReductionHint.INNER, 1280) not in before
        assert inductor.keep_rows() == 4096
        after = {case for case in cases if kept(*case)}
    assert after - before == {(ReductionHint.INNER, 1280), (ReductionHint.INNER, 4096)}
    assert before <= after
    assert torch.compiler.config.cache_key_tag == "attention rows of 4096"
