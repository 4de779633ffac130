"""Painting prompts, judging the pictures, and saying how sure the share is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from diffusion_fast import accuracy, world
from diffusion_fast.draw import arrange, draw


def a_painter(calls: list[int], wrong: str = "") -> accuracy.Paint:
    """Draws what it is asked for, but for prompts with a certain word, for which it paints nothing."""

    def paint(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        calls.append(len(prompts))
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            scene = world.parse(prompt)
            assert scene is not None
            if wrong and wrong in prompt:
                pictures.append(Image.new("RGB", (128, 128), "white"))
                continue
            pixels = draw(arrange([scene], torch.Generator().manual_seed(seed)))[0].permute(1, 2, 0)
            pictures.append(Image.fromarray((pixels * 255).round().byte().numpy()))
        return pictures

    return paint


def test_each_prompt_is_judged_in_batches_of_equal_size() -> None:
    calls: list[int] = []
    prompts = world.held_out_prompts(10)
    painted = accuracy.paint_and_judge(a_painter(calls, wrong="blue"), prompts, batch_size=4)
    assert calls == [4, 4, 4]
    assert [(each.prompt, each.seed) for each in painted] == list(zip(prompts, range(10), strict=True))
    assert [each.right for each in painted] == ["blue" not in prompt for prompt in prompts]
    assert all(bool(each.reason) != each.right for each in painted)


def test_a_prompt_of_another_world_is_an_error() -> None:
    with pytest.raises(ValueError, match="castles"):
        accuracy.paint_and_judge(lambda *_: [Image.new("RGB", (128, 128))], ["castles"], 1)


@pytest.mark.parametrize(
    # Wilson's interval by hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96
    ("right", "count", "low", "high"),
    [(8, 8, 0.6756, 1.0), (0, 8, 0.0, 0.3244), (475, 500, 0.9272, 0.9659)],
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    painted: list[Any] = [
        accuracy.Painted("", 0, index < right, "", Image.new("RGB", (1, 1))) for index in range(count)
    ]
    found = accuracy.Accuracy.of(painted)
    assert (found.right, found.prompts, found.accuracy) == (right, count, right / count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_the_sheet_shows_every_picture() -> None:
    painted = accuracy.paint_and_judge(a_painter([]), world.held_out_prompts(6), batch_size=6)
    page = accuracy.sheet(painted, "02-sdpa", columns=4)
    assert page.width > 4 * 128 and page.height > 2 * 128
    for index, each in enumerate(painted):
        x, y = 8 + index % 4 * ((page.width - 8) // 4), 32 + index // 4 * ((page.height - 32) // 2)
        assert page.crop((x, y, x + 128, y + 127)).tobytes() == each.picture.crop((0, 0, 128, 127)).tobytes()
