"""diffusion_fast: which inference optimizations pay on your GPU, for your diffusion model, measured.

import diffusion_fast
diffusion_fast.load_runs()  # one row a measured rung, as a pandas DataFrame
diffusion_fast.optimize(pipe, "sdpa", "channels_last", "fused_qkv")  # a diffusers pipeline of your own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_fast.own import optimize
    from diffusion_fast.tracking import load_runs

__all__ = ["load_runs", "optimize"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazily, because mlflow and pandas take seconds to import, and workers live without them.
    if name == "load_runs":
        from diffusion_fast.tracking import load_runs

        return load_runs
    if name == "optimize":
        from diffusion_fast.own import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
