"""The judge agrees with what was drawn, and disagrees with everything else."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from skimage.filters import gaussian

from diffusion_fast import world
from diffusion_fast.draw import arrange, draw
from diffusion_fast.judge import Seen, judge, read
from diffusion_fast.world import Scene, Thing

NOISE = 8 / 255


def pictures(scenes: list[Scene], seed: int, noise: float = NOISE) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    layout, drawn = arrange(scenes, generator), []
    for start in range(0, len(scenes), 100):
        clean = draw(layout[start : start + 100])
        noisy = (clean + noise * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
        drawn.extend((noisy * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return drawn


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Any]]:
    random = Random(11)
    scenes = [world.random_scene(random, unseen=index % 2 == 0) for index in range(2000)]
    return list(zip(scenes, pictures(scenes, seed=11), strict=True))


@pytest.fixture(scope="module")
def readings(drawn: list[tuple[Scene, Any]]) -> dict[int, tuple[str, list[Seen]]]:
    """What each drawn picture shows, which is the same whatever it is asked about, and takes longer than to judge."""
    return {id(picture): read(picture) for _, picture in drawn}


@pytest.fixture
def read_once(readings: dict[int, tuple[str, list[Seen]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_fast.judge.read", lambda picture: readings[id(picture)])


@pytest.mark.usefixtures("read_once")
def test_2000_noisy_scenes_are_read_back(drawn: list[tuple[Scene, Any]]) -> None:
    wrong = [(scene, judge(picture, scene).reason) for scene, picture in drawn]
    wrong = [each for each in wrong if each[1]]
    assert len(wrong) <= 0.005 * len(drawn), wrong[:5]


@pytest.mark.usefixtures("read_once")
def test_shuffled_captions_are_right_by_chance_alone(drawn: list[tuple[Scene, Any]]) -> None:
    scenes = [scene for scene, _ in drawn]
    right = sum(judge(picture, scene).right for scene, (_, picture) in zip(scenes[1:] + scenes[:1], drawn, strict=True))
    # A scene of one object is one of 384, and a third of a third of the pairs are of two such.
    assert right <= 5


def one(thing: Thing, background: str = "gray") -> Scene:
    return Scene(background, (thing,))


RED = Thing("circle", "red", "small")
BLUE = Thing("star", "blue", "large")
PAIR = Scene("white", (RED, BLUE), "above")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (PAIR, ""),
        (Scene("white", (BLUE, RED), "below"), ""),  # said the other way around
        (Scene("white", (Thing("circle", "red"), Thing("star", "blue")), "above"), ""),  # no size asked for
        (Scene("white", (RED, BLUE), "below"), "the first is above the second"),
        (Scene("white", (RED, BLUE), "left of"), "the first is above the second"),
        (Scene("black", (RED, BLUE), "above"), "a white background"),
        (one(RED, "white"), "2 objects: a small red circle, a large blue star"),
        (Scene("white", (Thing("circle", "red", "large"), BLUE), "above"), "a small red circle, a large blue star"),
        (Scene("white", (Thing("square", "red", "small"), BLUE), "above"), "a small red circle, a large blue star"),
        (Scene("white", (Thing("circle", "pink", "small"), BLUE), "above"), "a small red circle, a large blue star"),
        # Each attribute is there, on the wrong object.
        (
            Scene("white", (Thing("circle", "blue", "small"), Thing("star", "red", "large")), "above"),
            "a small red circle, a large blue star",
        ),
    ],
)
def test_a_picture_is_right_for_its_own_caption_alone(asked: Scene, reason: str) -> None:
    (picture,) = pictures([PAIR], seed=4)
    verdict = judge(picture, asked)
    assert (verdict.right, verdict.reason) == (not reason, reason)


def test_what_is_no_scene_is_not_right() -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    empty = np.full((128, 128, 3), 128, dtype=np.uint8)
    whole = pictures([one(RED)], seed=1)[0]
    half = whole.copy()
    half[:, round(read(whole)[1][0].x) :] = whole[0, 0]
    smeared = np.stack([np.roll(whole, shift, axis=1) for shift in range(24)]).mean(0).astype(np.uint8)
    assert judge(whole, one(RED)).right
    (large,) = pictures([one(Thing("circle", "red", "large"))], seed=1)
    (seen,) = read(large)[1]
    y, x = np.mgrid[:128, :128]
    cored, banded = large.copy(), large.copy()
    cored[np.hypot(x - seen.x, y - seen.y) < 0.6 * seen.radius] = world.COLOURS["blue"]
    banded[(np.hypot(x - seen.x, y - seen.y) < seen.radius) & (x > seen.x + 0.3 * seen.radius)] = world.COLOURS[
        "yellow"
    ]
    for picture in (cored, banded):
        assert not judge(picture, one(Thing("circle", "red", "large"))).right
    for picture in (noise, empty, half, smeared):
        assert not judge(picture, one(RED)).right
    assert judge(empty, one(RED)).reason == "no objects"


def test_a_soft_edge_is_no_other_colour() -> None:
    """A VAE blurs: over four pixels the object fades into the background."""
    rings = [Scene(ground, (Thing("ring", "red", "large"),)) for ground in world.BACKGROUNDS]
    for scene, sharp in zip(rings, pictures(rings, seed=8, noise=0.0), strict=True):
        soft = gaussian(sharp, 1.2, channel_axis=2)
        assert judge(soft, scene).reason == ""


def test_an_object_has_its_place_and_its_size() -> None:
    scene = one(Thing("triangle", "yellow", "large"), "black")
    layout = arrange([scene], torch.Generator().manual_seed(6))
    background, (seen,) = read(draw(layout)[0].permute(1, 2, 0).numpy())
    assert (background, seen.thing) == ("black", scene.things[0])
    x, y = layout.centre[0, 0].tolist()
    assert (seen.x, seen.y, seen.radius) == pytest.approx((x, y, layout.radius[0, 0].item()), abs=1.5)


def test_every_object_is_read_from_a_clean_picture() -> None:
    scenes = [one(thing) for thing in world.THINGS]
    assert [judge(p, s).reason for p, s in zip(pictures(scenes, 2, noise=0.0), scenes, strict=True)] == [""] * 96
