"""Let Inductor's coordinate descent compile its candidates in parallel, and choose among them as it always does.

The descent compiles a candidate, benchmarks it, and goes on to the next: one core works, mostly at compiling, and
Inductor's compile workers idle. Here, whenever the descent comes to a candidate that nobody has compiled, the workers
first compile it and those next in line, one each, into Triton's disk cache. Then the descent compiles as ever, and
finds them there: the same candidates in the same order, each benchmarked alone, while no worker is busy.

For the kernels to be found, all processes must have one TRITON_CACHE_DIR and one ptxas: launch.py sees to it.

And what a descent found before a restart isn't searched for again: Inductor means it so, and forgets it on the way from
a worker.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import time
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0  # for the slowest of the candidates in line; what isn't done by then the descent compiles itself
ENVIRONMENT = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # may have changed since the workers started


@dataclass
class Prefetch:
    """What was compiled ahead of the descent since it was installed. A failure here doesn't change what it chooses."""

    kernels: int = 0  # tuned, whether or not anything was compiled ahead for them
    found: int = 0  # left as an earlier descent had found them, where Inductor would have searched again
    candidates: int = 0  # given to the workers, who may compile some that the descent then never comes to
    failed: int = 0  # of these: not compiled, for instance because too large
    seconds: float = 0.0  # spent waiting for the workers
    error: str = ""  # the first one
    given_up: bool = False  # the workers answered nothing for PATIENCE_S: from then on the descent is on its own

    def compile_ahead(self, autotuner: Any, candidate: Any, best: Any, sent: set[Any]) -> None:
        """Have `candidate` and what comes after it compiled, unless it's in `sent` already; add what was to `sent`."""
        start = time.monotonic()
        try:
            self._compile_ahead(autotuner, candidate, best, sent)
        except Exception as error:  # whatever it is, the descent can do without
            self._note(error)
        self.seconds += time.monotonic() - start

    def _compile_ahead(self, autotuner: Any, candidate: Any, best: Any, sent: set[Any]) -> None:
        from torch._inductor.async_compile import AsyncCompile, get_compile_threads
        from torch._inductor.runtime.runtime_utils import triton_config_to_hashable

        tuner, key = autotuner.coordesc_tuner, triton_config_to_hashable(candidate)
        if key in sent or tuner.lookup_in_cache(candidate) is not None:
            return
        if self.given_up or not autotuner.filename or not AsyncCompile.use_process_pool():
            return
        # Were more of them sent than there are workers, a new best would make many of them useless before their turn.
        line = {key: candidate} | {key: config for key, config in next_candidates(tuner, best) if key not in sent}
        line = dict(itertools.islice(line.items(), get_compile_threads()))
        sent.update(line)
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        job = functools.partial(compile_candidate, environment, autotuner.filename, autotuner.fn.__name__)
        futures = [AsyncCompile.process_pool().submit(job, config) for config in line.values()]
        self.candidates += len(futures)
        done, late = wait(futures, PATIENCE_S)
        for error in filter(None, (future.exception() for future in done)):
            self.failed += 1
            self._note(error)
        if late:
            self.failed += len(late)
            self._note(TimeoutError(f"{len(late)} of {len(futures)} candidates not compiled in {PATIENCE_S:g} s"))
            self.given_up = not done

    def take_found(self, autotuner: Any) -> None:
        """Mark a kernel's only config as found by a descent, where Inductor's record of its tuning says so.

        A worker takes the config from that record and marks it, but triton.Config loses the mark when it is unpickled,
        and a descent would start where an earlier one has ended. (PyTorch mends that in a later version with another
        mark: https://github.com/pytorch/pytorch/pull/181292. One thing is left to torch 2.13: when a graph is loaded
        from its cache, 2.11 searches again for the kernels that had but one config to begin with.)
        """
        cache = getattr(autotuner.save_cache_hook, "__self__", None)
        configs = [result.config for result in autotuner.compile_results] or autotuner.configs or []
        if cache is None or len(configs) != 1:
            return
        (config,) = configs
        if not getattr(config, "found_by_coordesc", False):
            # Torch 2.13 writes found_by_coordesc before the descent, too, but with the hash of what it compiled.
            sizes = config.kwargs | {"num_warps": config.num_warps, "num_stages": config.num_stages}
            told = {"configs_hash": cache.configs_hash, "found_by_coordesc": True, "triton_cache_hash": None}
            record = cache._read() or {}
            if any(record.get(name) != value for name, value in (sizes | told).items()):
                return
            config.found_by_coordesc = True
            self.found += 1
        autotuner.inductor_meta["dynamic_scale_rblock"] = False  # adds a config that would then be tuned

    def _note(self, error: BaseException) -> None:
        # A worker's error holds a whole traceback, whose last line says what it was.
        self.error = self.error or f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"


def next_candidates(tuner: Any, best: Any) -> list[tuple[Any, Any]]:
    """What `tuner`, a CoordescTuner, tries in its next round if `best` stays its best: keys and configs, in order.

    The tuner itself is asked: a copy of it goes one round in which nothing is ever better. What it has already
    benchmarked is left out.
    """
    from torch._inductor.runtime.runtime_utils import triton_config_to_hashable

    found: dict[Any, Any] = {}

    def never_better(function: Any, candidate: Any, best: Any, best_timing: float) -> tuple[bool, float]:
        if tuner.lookup_in_cache(candidate) is None:
            found.setdefault(triton_config_to_hashable(candidate), candidate)
        return False, float("inf")

    scout = copy.copy(tuner)
    scout.compare_config = never_better
    scout.autotune(None, best, 1.0)  # a timing is given, so the function to benchmark isn't called
    return list(found.items())


def compile_candidate(environment: dict[str, str], path: str, name: str, config: Any) -> None:
    """A worker's job: compile one config of the kernel `name` in the module at `path` into Triton's disk cache."""
    os.environ.update(environment)
    _kernel(path, name)._precompile_config(config)


@functools.lru_cache(maxsize=1)  # a worker is given several configs of one kernel, and then of another
def _kernel(path: str, name: str) -> Any:
    from torch._inductor.codecache import PyCodeCache

    return getattr(PyCodeCache.load_by_key_path(Path(path).stem, path), name)


@functools.cache
def parallel_coordinate_descent() -> Prefetch:
    """Install it in this process, before a compiled module's first call. Every later call returns the same account.

    It sits on private parts of torch. Where they are gone, the descent stays as it is, and the account says why.
    """
    account = Prefetch()
    try:
        from torch._inductor.runtime.coordinate_descent_tuner import CoordescTuner
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        descend, compare = CachingAutotuner._coordinate_descent_tuning, CoordescTuner.compare_config
        precompile = CachingAutotuner.precompile
    except (ImportError, AttributeError) as error:
        account.given_up = True
        account._note(error)
        return account

    @functools.wraps(descend)
    def descend_behind(autotuner: Any, launcher: Any, *args: Any, **kwargs: Any) -> Any:
        tuner, sent = autotuner.coordesc_tuner, set[Any]()

        def compare_config(function: Any, candidate: Any, best: Any, best_timing: float) -> Any:
            account.compile_ahead(autotuner, candidate, best, sent)
            return compare(tuner, function, candidate, best, best_timing)

        account.kernels += 1
        tuner.compare_config = compare_config
        try:
            return descend(autotuner, launcher, *args, **kwargs)
        finally:
            del tuner.compare_config  # the autotuner may yet be pickled, and closures can't be

    @functools.wraps(precompile)
    def precompile_found(autotuner: Any, *args: Any, **kwargs: Any) -> None:
        try:
            account.take_found(autotuner)
        except Exception as error:  # then it is searched for again
            account._note(error)
        precompile(autotuner, *args, **kwargs)

    CachingAutotuner._coordinate_descent_tuning = descend_behind
    CachingAutotuner.precompile = precompile_found
    return account


LONGEST_ROW = 4096  # numbers: of a row of 16 bits 16 a thread, of 8 warps


def keep_rows() -> int:
    """Have Inductor hold rows of up to LONGEST_ROW numbers in registers while it reduces them. Returns LONGEST_ROW.

    For this thread, from now on. The account of caches is kept straight: what was compiled without it isn't found.
    """
    import torch
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class LongRows(InductorChoices):  # type: ignore[misc]
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            inner = features.get_reduction_hint() == ReductionHint.INNER  # a row's numbers lie beside each other
            if inner and not cooperative_reduction:
                return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW))
            return bool(InductorChoices.should_use_persistent_reduction(features, cooperative_reduction))

    V.set_choices_handler(LongRows())
    torch.compiler.config.cache_key_tag += f" rows of {LONGEST_ROW}"
    return LONGEST_ROW
