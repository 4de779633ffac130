"""Does the bundled model paint what its prompts say? Held-out prompts, the judge's verdicts, and a sheet to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffusion_fast import world

if TYPE_CHECKING:
    from PIL.Image import Image

Paint = Callable[[list[str], list[int]], "list[Image]"]  # prompts and as many seeds → pictures


@dataclass(frozen=True)
class Painted:
    """One prompt's picture, and what the judge says of it."""

    prompt: str
    seed: int
    right: bool
    reason: str
    picture: Image

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "picture"}


def paint_and_judge(paint: Paint, prompts: Sequence[str], batch_size: int) -> list[Painted]:
    """Every prompt painted from a seed of its own, its number, in batches of exactly `batch_size` pictures."""
    import numpy as np

    from diffusion_fast.judge import judge

    painted, numbered = [], list(enumerate(prompts))
    for start in range(0, len(prompts), batch_size):
        wanted = numbered[start : start + batch_size]
        full = [*wanted, *[wanted[-1]] * (batch_size - len(wanted))]  # compiled models want equal shapes
        pictures = paint([prompt for _, prompt in full], [seed for seed, _ in full])
        for (seed, prompt), picture in zip(wanted, pictures, strict=False):
            scene = world.parse(prompt)
            if scene is None:
                raise ValueError(f"{prompt!r} is not a caption of the small world")
            verdict = judge(np.asarray(picture), scene)
            painted.append(Painted(prompt, seed, verdict.right, verdict.reason, picture))
    return painted


@dataclass(frozen=True)
class Accuracy:
    """The share of prompts painted right, in 0..1, with the 95% interval of Wilson's score."""

    right: int
    prompts: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, painted: Sequence[Painted]) -> Accuracy:
        """https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats._result_classes.BinomTestResult.proportion_ci.html"""
        from scipy.stats import binomtest

        right, prompts = sum(each.right for each in painted), len(painted)
        low, high = binomtest(right, prompts).proportion_ci(0.95, method="wilson")
        return cls(right, prompts, right / prompts, float(low), float(high))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sheet(painted: Sequence[Painted], title: str, columns: int = 4) -> Image:
    """The pictures in a grid, each with its prompt and the verdict under it."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    width, height = painted[0].picture.size
    cell_width, cell_height, pad, head = max(width, 160) + 16, height + 76, 8, 32
    rows = -(-len(painted) // columns)
    page = Image.new("RGB", (columns * cell_width + pad, head + rows * cell_height), "white")
    pen = ImageDraw.Draw(page)
    pen.text((pad, 8), title, "black", font)
    for index, each in enumerate(painted):
        x, y = pad + index % columns * cell_width, head + index // columns * cell_height
        page.paste(each.picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline="#999999")
        lines = textwrap.wrap(each.prompt, 30)[:3]
        pen.text((x, y + height + 4), "\n".join(lines), "black", small)
        verdict, ink = ("right", "#087830") if each.right else (textwrap.shorten(each.reason, 34), "#b00020")
        pen.text((x, y + height + 6 + 14 * len(lines)), verdict, ink, small)
    return page
