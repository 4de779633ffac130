"""What was timed on this device before, kept beside the compile caches: the same question isn't measured twice.

So a recipe's later rounds make the choices of its first, and a saved cache brings them along.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kept(question: str, measure: Callable[[], float]) -> float:
    """Seconds that `measure` gives, or gave before, where this process has a folder for compile caches.

    They are infinite where something can't be done.
    """
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return measure()
    asked = f"{question}, {_device()}"
    file = Path(folder) / "timings" / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
    try:
        known = json.loads(file.read_text())
        if known["question"] == asked:
            return math.inf if known["seconds"] is None else float(known["seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or not whole
    seconds = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps({"question": asked, "seconds": None if seconds == math.inf else seconds}))
    partial.replace(file)
    return seconds


def version(module: Any) -> str:
    """Of a module's source: what was timed of another one is another question."""
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12]


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU, torch {torch.__version__}"
    cudnn = torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
