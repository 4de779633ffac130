"""A network compiled ahead of time: a package on disk for each shape of its inputs, which later processes load.

Where torch.compile traces a network anew in each process, to find in its cache what it was compiled to, a package is
found by what it depends on and run as it is. torch.export traces and AOTInductor compiles:
https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusion_fast import graphs

FOLDER = "ahead_of_time"  # in Inductor's cache, so that whatever keeps, shares or saves that keeps these as well
MOST = graphs.MOST  # packages of one network
ALIGNMENT = 16  # bytes, which Inductor's kernels on a GPU count on
PLAIN = (bool, str, type(None))  # arguments that are compiled in; a number may be another one in every step

ATTENTION = ("flash", "mem_efficient", "cudnn", "math")  # PyTorch's kernels: which are allowed is decided in tracing

# A package holds code, and the weights stay the pipeline's. What Inductor makes of them beforehand would be weights
# again, of one model: nothing is frozen, and the small ones, such as a bias of 4 numbers, aren't written into the code.
WEIGHTS_APART = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # they come beside the files
    "always_keep_tensor_constants": True,
    "freezing": False,
    "triton.cudagraphs": False,
}


_only_known = False


@contextmanager
def nothing_new() -> Iterator[None]:
    """Within, a call that would need another package raises RuntimeError: torch.compile's stance fail_on_recompile."""
    global _only_known
    before, _only_known = _only_known, True
    try:
        yield
    finally:
        _only_known = before


class AheadOfTime:
    """A network's forward, by a package for each combination of its arguments' shapes, dtypes and plain values.

    A package that isn't in `folder` is compiled into it, at the first call that needs it. Other shapes get their own,
    up to MOST; further ones, and calls with numbers among the arguments, are computed by the network as it was, and
    counted in `eager_calls`. `made_by` is what changed the network's code. Weights that are changed in place count at
    once; ones that are replaced don't.
    """

    def __init__(
        self, name: str, network: Any, folder: Path, options: dict[str, Any], made_by: tuple[str, ...] = ()
    ) -> None:
        self.name, self.network, self.folder, self.made_by = name, network, folder, made_by
        self.options = options | WEIGHTS_APART
        self.original = network.forward
        self.packages: dict[Any, Any] = {}
        self.from_cache = self.eager_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils import _pytree as pytree

        if graphs.are_unwanted():
            return self.original(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        if not all(isinstance(leaf, (torch.Tensor, *PLAIN)) for leaf in leaves):
            return self._eagerly("was called with a number", args, kwargs)
        key = tree, tuple((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        if key not in self.packages and _only_known:
            raise RuntimeError(f"{self.name} would have to be compiled for other arguments than before")
        if key not in self.packages and len(self.packages) >= MOST:
            return self._eagerly(f"was compiled for {MOST} shapes already", args, kwargs)
        device = next(self.network.parameters()).device
        given = [_as_compiled_for(leaf, device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(given, tree)
        if key not in self.packages:
            self.packages[key] = self._package(key, args, kwargs)
        return self.packages[key](*args, **kwargs)

    def account(self) -> dict[str, int]:
        return {"graphs": len(self.packages), "from_cache": self.from_cache, "eager_calls": self.eager_calls}

    def _package(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The package for such arguments as these: what is there is loaded, what isn't is compiled before."""
        file = self.folder / f"{self.name}-{self._digest(key)}.pt2"
        if file.is_file():
            self.from_cache += 1
        else:
            standing_in, self.network.forward = self.network.forward, self.original
            try:
                compile_package(self.network, args, kwargs, self.options, file)
            finally:
                self.network.forward = standing_in
        return load_package(self.network, file)

    def _digest(self, key: Any) -> str:
        """Of all that a package depends on. Paths and weights' values aren't among it."""
        tree, leaves = key
        facts = {
            "arguments": [str(tree), str(leaves)],
            "network": _structure(self.network),
            "made by": self.made_by,
            "options": self.options,
            "around": _around(next(self.network.parameters()).device),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _eagerly(self, why: str, args: Any, kwargs: Any) -> Any:
        if not self.eager_calls:
            warnings.warn(f"{self.name} {why}: this call is computed without a package.", stacklevel=3)
        self.eager_calls += 1
        return self.original(*args, **kwargs)


def cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / FOLDER


def compile_package(
    network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any], file: Path
) -> None:
    """Export the network's call and compile it to `file`, whole or not at all."""
    import torch
    from torch._inductor.package import package_aoti

    own = _weights(network)
    if made_of_others := [name for name, tensor in own.items() if type(tensor) is not torch.Tensor]:
        # Such as torchao's: what they are made of would be none of the network's weights, and stay with the package.
        raise RuntimeError(f"{made_of_others[0]} is no plain tensor: its weights can't be kept apart from the package")
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as scratch:
        program = torch.export.export(network, args, kwargs, strict=False)
        made: Any = torch._inductor.aot_compile(
            program.module(),
            args,
            kwargs,
            options=options | {"aot_inductor.output_path": scratch},
        )
        files = [each for each in made if isinstance(each, str)]
        others = {name: each.get_weight(name)[0] for each in made if each not in files for name in each}
        constants = {name: tensor.clone() for name, tensor in others.items() if name not in own}
        torch.save(constants, Path(scratch, "constants"))
        package_aoti(str(Path(scratch, "package.pt2")), files)
        Path(scratch, "constants").replace(_constants_of(file))
        Path(scratch, "package.pt2").replace(file)  # last: it says that both are there


def load_package(network: Any, file: Path) -> Any:
    """What `compile_package` left, computing with this network's own weights."""
    import torch

    # Single-threaded: it then waits for no events of its own, which a CUDA graph couldn't capture.
    package = torch._inductor.aoti_load_package(str(file), run_single_threaded=True)
    own = _weights(network)
    # Each where it was: beside a network on a GPU some are read by the CPU, through their addresses.
    constants = torch.load(_constants_of(file), weights_only=True)
    found = {name: own.get(name, constants.get(name)) for name in package.get_constant_fqns()}
    if missing := sorted(name for name, tensor in found.items() if tensor is None):
        raise RuntimeError(f"{file.name} needs {missing[0]}, which the network doesn't have")
    # User-managed: no copies. The package keeps addresses, so that the tensors have to be kept as well.
    package.load_constants(found, check_full_update=True, user_managed=True)
    package.kept = found
    return package


def _constants_of(file: Path) -> Path:
    """Where a package's constants are that aren't weights: tensors that the network's code makes."""
    return file.with_suffix(".constants")


def _weights(network: Any) -> dict[str, Any]:
    named = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def _as_compiled_for(tensor: Any, device: Any) -> Any:
    """Contiguous, aligned, and on `device`, which a package takes for granted: other layouts need none of their own."""
    laid_out = tensor.to(device).contiguous()
    return laid_out.clone() if laid_out.data_ptr() % ALIGNMENT else laid_out


def _structure(network: Any) -> list[Any]:
    """Classes and settings of the network's modules, and how its weights lie in memory."""
    weights = [
        (name, str(type(each)), str(each.dtype), tuple(each.shape), each.stride())
        for name, each in _weights(network).items()
    ]
    settings = {name: value for name, value in getattr(network, "config", {}).items() if not name.startswith("_")}
    attending = [type(each.processor).__qualname__ for each in network.modules() if hasattr(each, "processor")]
    return [str(network), settings, network.training, attending, weights]


def _around(device: Any) -> dict[str, Any]:
    """The machine, the versions and the switches that decide what code is generated."""
    import torch

    machine: list[Any]
    if device.type == "cuda":
        machine = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.version.cuda]
    else:
        machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    flags = torch._inductor.config.save_config_portable()
    flags.pop("aot_inductor.metadata", None)  # a compilation notes its device there
    return {
        "machine": [device.type, platform.machine(), *machine],
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "sources": _sources(),
        "inductor": flags,
        "tag": torch.compiler.config.cache_key_tag,
        "attention kernels": [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ATTENTION],
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@functools.cache
def _sources() -> str:
    """A digest of this package's own code, some of which is what is compiled."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
