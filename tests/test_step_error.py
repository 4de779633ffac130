"""scripts/step_error.py, on a miniature."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffusion_fast.models import MODELS
from tests.conftest import script
from tests.miniatures import miniature


@pytest.mark.parametrize("model", ("sdxl", "sd15"))
def test_its_lines_are_errors_of_more_and_more_layers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, model, miniature(model, tmp_path))
    try:
        script("step_error").main(["--model", model, "--size", "256"])
    finally:
        torch.set_grad_enabled(True)
    lines = re.findall(r"^(.+?) +(\d+) layers +([\d.]+)% ", capsys.readouterr().out, re.MULTILINE)
    layers, errors = (
        {name: float(line[at]) for name, *_ in lines for line in lines if line[0] == name} for at in (1, 2)
    )
    *places, convolutions, linears, both = layers
    assert sum(layers[each] for each in places) == layers[convolutions] > 10
    assert layers[both] == layers[convolutions] + layers[linears]
    assert 0.1 < max(errors[each] for each in places) <= 1.2 * errors[convolutions]
    assert max(errors[convolutions], errors[linears]) < errors[both] < 20
