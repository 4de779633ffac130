"""scripts/step_error.py, on a miniature."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffusion_fast.eight_bits import FORMATS
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
    *places, convolutions, linears, both, both_and_fp8, both_and_int8 = layers
    for name, more in (("fp8", both_and_fp8), ("int8", both_and_int8)):
        alone = f"{name}, attention"
        places.remove(alone)
        assert layers[more] == layers[both] + layers[alone] and layers[alone] > 1
        assert 0 < errors[alone] < errors[both] < errors[more] * 1.05
    assert errors["int8, attention"] < errors["fp8, attention"]  # which rounds more of its numbers, and coarser
    assert sum(layers[each] for each in places) == layers[convolutions] > 10
    assert layers[both] == layers[convolutions] + layers[linears]
    assert 0.1 < max(errors[each] for each in places) <= 1.2 * errors[convolutions]
    assert max(errors[convolutions], errors[linears]) < errors[both] < 20


def test_attention_is_rounded_while_it_is_asked_for() -> None:
    attend, numbers = torch.nn.functional.scaled_dot_product_attention, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 64, 32, generator=numbers) for _ in range(3))
    exact, errors = attend(q, k + 5, v), {}
    for name in ("fp8", "int8"):
        with script("step_error").attention_in(FORMATS[name]):
            made = torch.nn.functional.scaled_dot_product_attention(q, k + 5, v)
        errors[name] = ((made - exact).norm() / exact.norm()).item()
    assert torch.nn.functional.scaled_dot_product_attention is attend
    assert 0.001 < errors["int8"] < 0.02 < errors["fp8"] < 0.2, errors
