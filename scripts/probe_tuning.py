"""On a GPU: what does compiling ahead (diffusion_fast/inductor.py) do to the time and the outcome of Inductor's tuning?

    PYTHONPATH=/tmp/site python3 -u scripts/probe_tuning.py
    PYTHONPATH=/tmp/site python3 -u scripts/probe_tuning.py --timeout 180 --variants stock,parallel,stock

A ResNet block and a feed-forward block of SDXL's sizes are compiled with coordinate descent, once a variant, each in a
process of its own with fresh caches. Every kernel is printed as it's tuned: a variant cut short still says something.
A second `stock` tells how often two searches of the same kind agree: kernels some 0.1% apart change places by noise.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
    "max_autotune": False,
}


def child(variant: str, blocks: list[str]) -> None:
    """Compile and tune; every line printed is an event in JSON."""
    start = time.monotonic()

    def say(event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, "at": round(time.monotonic() - start, 1)} | facts), flush=True)

    import torch
    import triton
    from torch._dynamo.utils import counters
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    from diffusion_fast.inductor import Prefetch, parallel_coordinate_descent

    account = parallel_coordinate_descent() if variant == "parallel" else Prefetch()
    seen: Counter[str] = Counter()  # of compiles in this process, and of seconds spent benchmarking
    triton.knobs.compilation.listener = lambda **facts: seen.update(["hit" if facts["cache_hit"] else "miss"])
    descend, bench = CachingAutotuner._coordinate_descent_tuning, CachingAutotuner.bench

    def state() -> dict[str, float]:
        benchmarked = counters["inductor"]["coordesc_tuning_bench"]
        ahead = {"prefetched": account.candidates, "failed": account.failed, "waited_s": account.seconds}
        return {name: seen[name] for name in ("hit", "miss", "bench_s")} | {"benchmarked": benchmarked} | ahead

    def timed_bench(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic()
        try:
            return bench(*args, **kwargs)
        finally:
            seen["bench_s"] += time.monotonic() - begin  # type: ignore[assignment]

    def timed_descent(autotuner: Any, *args: Any, **kwargs: Any) -> Any:
        begin, before = time.monotonic(), state()
        launcher = descend(autotuner, *args, **kwargs)
        config = launcher.config
        facts = {name: round(value - before[name], 2) for name, value in state().items()}
        best = f"{config.kwargs | {'num_warps': config.num_warps, 'num_stages': config.num_stages}}"
        name = f"{autotuner.fn.__name__}:{autotuner.kernel_hash[:8]}"
        say("kernel", name=name, seconds=round(time.monotonic() - begin, 2), best=best, **facts)
        return launcher

    CachingAutotuner._coordinate_descent_tuning, CachingAutotuner.bench = timed_descent, timed_bench

    stack, inputs = build(blocks)
    say("built", gpu=torch.cuda.get_device_name(), torch=torch.__version__, workers=get_compile_threads())
    with torch.no_grad():
        eager = stack(*inputs)
        AsyncCompile.wait_pool_ready()
        say("ready")
        stack.compile(fullgraph=True, options=OPTIONS)
        begin = time.monotonic()
        compiled = stack(*inputs)
        torch.cuda.synchronize()
    difference = max((a.float() - b.float()).abs().max().item() for a, b in zip(eager, compiled, strict=True))
    facts = {name: round(value, 2) for name, value in state().items()}
    say("done", seconds=round(time.monotonic() - begin, 1), difference=difference, account=str(account), **facts)


def build(blocks: list[str]) -> tuple[Any, tuple[Any, ...]]:
    """A module that applies each block to its own input, and the inputs."""
    import torch
    from diffusers.models.attention import FeedForward
    from diffusers.models.resnet import ResnetBlock2D

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resnet = ResnetBlock2D(in_channels=320, out_channels=640, temb_channels=1280)
            self.norm, self.feed_forward = torch.nn.LayerNorm(640), FeedForward(640, activation_fn="geglu")

        def forward(self, image: Any, time_embedding: Any, tokens: Any) -> list[Any]:
            out = []
            if "resnet" in blocks:
                out.append(self.resnet(image, time_embedding))
            if "geglu" in blocks:
                out.append(tokens + self.feed_forward(self.norm(tokens)))
            return out

    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    stack: Any = Stack()
    stack = stack.to(**kind).eval().to(memory_format=torch.channels_last)
    image = torch.randn(2, 320, 64, 64, **kind).to(memory_format=torch.channels_last)
    return stack, (image, torch.randn(2, 1280, **kind), torch.randn(2, 4096, 640, **kind))


def run(variant: str, blocks: str, folder: Path, timeout_s: float) -> list[dict[str, Any]]:
    """One variant's events, printed as they come."""
    from diffusion_fast.launch import _ptxas

    folder.mkdir(parents=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    environment = os.environ | caches | _ptxas() | {"PYTHONPATH": os.pathsep.join(paths)}
    print(f"\n== {variant}, at most {timeout_s:g} s, ptxas {environment.get('TRITON_PTXAS_PATH')}", flush=True)
    events: list[dict[str, Any]] = []
    command = (sys.executable, str(Path(__file__).resolve()), "--child", variant, "--blocks", blocks)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, start_new_session=True
        )

        def read() -> None:
            for line in process.stdout or ():
                if line.startswith('{"event"'):
                    events.append(json.loads(line))
                    line = "  ".join(f"{name} {value}" for name, value in events[-1].items()) + "\n"
                print(line, end="", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        ended: Any = "timeout"
        try:
            ended = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: it and its compile workers
            process.wait()
        reader.join(5)
    if ended != 0:
        print(f"{variant} ended by {ended}\n" + "\n".join((folder / "log").read_text().splitlines()[-20:]), flush=True)
    return events


def compare(results: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Each variant against the first, over the kernels which both have tuned."""
    tuned = [{event["name"]: event for event in events if event["event"] == "kernel"} for _, events in results]
    print("\n== summary", flush=True)
    for (variant, events), kernels in zip(results, tuned, strict=True):
        total = Counter[str]()
        for event in kernels.values():
            total.update({name: value for name, value in event.items() if isinstance(value, int | float)})
        done = next((event for event in events if event["event"] == "done"), {})
        first = f"first call {done['seconds']} s, difference {done['difference']:.3g}" if done else "not finished"
        print(
            f"{variant:9} {first}; {len(kernels)} kernels tuned in {total['seconds']:.1f} s"
            f" ({total['bench_s']:.1f} s of it benchmarking), {total['benchmarked']:g} candidates benchmarked;"
            f" compiles while tuning: {total['hit']:g} hits, {total['miss']:g} misses;"
            f" {total['prefetched']:g} prefetched ({total['failed']:g} failed) in {total['waited_s']:.1f} s"
        )
        if done:
            print(f"          {done['account']}")
    for (variant, _), kernels in zip(results[1:], tuned[1:], strict=True):
        both = [name for name in tuned[0] if name in kernels]
        seconds = [sum(each[name]["seconds"] for name in both) for each in (tuned[0], kernels)]
        same = [name for name in both if tuned[0][name]["best"] == kernels[name]["best"]]
        print(
            f"{variant} against {results[0][0]}: {len(both)} kernels tuned by both, in {seconds[0]:.1f} and"
            f" {seconds[1]:.1f} s; the same best config for {len(same)}"
        )
        for name in both:
            if name not in same:
                print(f"    {name}: {tuned[0][name]['best']} became {kernels[name]['best']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="stock,parallel")
    parser.add_argument("--blocks", default="resnet,geglu")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a variant")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.child:
        child(arguments.child, arguments.blocks.split(","))
        return
    with tempfile.TemporaryDirectory(prefix="probe_tuning_", ignore_cleanup_errors=True) as work:
        variants = list(enumerate(arguments.variants.split(",")))
        compare(
            [
                (variant, run(variant, arguments.blocks, Path(work) / f"{number}_{variant}", arguments.timeout))
                for number, variant in variants
            ]
        )


if __name__ == "__main__":
    main()
