"""A function of tensors as CUDA graphs: launched whole, instead of kernel by kernel.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WARMUPS = 2  # calls before a capture: the first compiles and lets libraries choose their kernels and make their handles
MOST = 16  # graphs of one function; each keeps its inputs and outputs

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


@dataclass
class Captured:
    """One recording: fill `inputs`, `replay`, and `outputs` hold what the function would have returned."""

    inputs: list[Any]
    outputs: Any
    replay: Callable[[], None]


_without = False


@contextmanager
def none() -> Iterator[None]:
    """Within, every Graphed calls its function: for what has to see single operations, such as a counter of them."""
    global _without
    before, _without = _without, True
    try:
        yield
    finally:
        _without = before


def are_unwanted() -> bool:
    """Whether this is within `none`."""
    return _without


class Graphed:
    """`function`, recorded once for each combination of its arguments' shapes, dtypes and plain values.

    Other shapes are recorded when they come, up to MOST; further ones are computed without a graph, and counted in
    `eager_calls`. What is returned is the caller's own: the next replay doesn't change it. `state` is what else
    the recording depends on.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        device: Any,
        record: Record | None = None,
        state: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self.name, self.function, self.device, self.state = name, function, device, state
        self.record = record or record_on_gpu
        self.captured: dict[Any, Captured] = {}
        self.captures = self.replays = self.eager_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils import _pytree as pytree

        if _without:
            return self.function(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # Strides don't count: an input is copied into the graph's own, whose strides are those of the first.
        key = (
            self.state(),
            tree,
            tuple((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        )
        found = self.captured.get(key)
        if found is None:
            if len(self.captured) >= MOST:
                return self._without_a_graph(args, kwargs)
            found = self.captured[key] = self._capture(leaves, tree)
        for own, given in zip(found.inputs, tensors, strict=True):
            own.copy_(given)
        found.replay()
        self.replays += 1
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, found.outputs)

    def account(self) -> dict[str, int]:
        return {"captures": self.captures, "replays": self.replays, "eager_calls": self.eager_calls}

    def _capture(self, leaves: list[Any], tree: Any) -> Captured:
        import torch
        from torch.utils import _pytree as pytree

        own = [
            leaf.to(self.device, copy=True) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]  # a scheduler may keep its time steps on the CPU, and a graph can't read there
        args, kwargs = pytree.tree_unflatten(own, tree)
        replay, outputs = self.record(lambda: self.function(*args, **kwargs))
        self.captures += 1
        return Captured([leaf for leaf in own if isinstance(leaf, torch.Tensor)], outputs, replay)

    def _without_a_graph(self, args: Any, kwargs: Any) -> Any:
        if not self.eager_calls:
            warnings.warn(
                f"{self.name} was captured in {MOST} shapes already: this one is computed without a graph.",
                stacklevel=3,
            )
        self.eager_calls += 1
        return self.function(*args, **kwargs)


def record_on_gpu(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record what `function` launches. Returns how to launch it again, and the tensors that it fills each time."""
    import torch

    place = _place()
    # Warm-up calls happen on the stream of the capture: cuBLAS keeps a workspace for each stream that it has met, which
    # then is there already, once, and not in the graphs' memory.
    place.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(place.stream):
        for _ in range(WARMUPS):
            function()
    torch.cuda.current_stream().wait_stream(place.stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=place.pool, stream=place.stream):
        outputs = function()
    return graph.replay, outputs


@dataclass
class Place:
    """Where this process's graphs are captured: one stream, and one pool of memory, for no two are replayed at once."""

    stream: Any
    pool: Any


@functools.cache
def _place() -> Place:
    import torch

    return Place(torch.cuda.Stream(), torch.cuda.graph_pool_handle())


def forget(graphed: Iterable[Graphed]) -> None:
    """Drop all recordings, for when what was recorded has changed. They must be all that this process has."""
    for each in graphed:
        each.captured.clear()
    if _place.cache_info().currsize:
        import torch

        # A pool whose graphs are all gone can't be used again while anything of it is held.
        _place().pool = torch.cuda.graph_pool_handle()
