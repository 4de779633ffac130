"""The bundled model's world: what its captions can say, what is held out, and that pictures show what they should."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch

from diffusion_fast import world
from diffusion_fast.draw import arrange, draw
from diffusion_fast.world import Scene, Thing


def test_a_tenth_of_the_objects_is_held_out_and_every_part_of_them_is_seen() -> None:
    assert len(world.UNSEEN) == 9
    assert len(world.THINGS) == 96
    for part in ("shape", "colour", "size"):
        everything = {getattr(thing, part) for thing in world.THINGS}
        assert {getattr(thing, part) for thing in world.UNSEEN} == everything
    pairs = {(thing.shape, thing.colour) for thing in world.THINGS}
    assert {(thing.shape, thing.colour) for thing in world.SEEN} == pairs


def test_training_never_shows_a_held_out_object_and_held_out_scenes_always_do() -> None:
    random = Random(1)
    for _ in range(2000):
        assert not any(map(world.held_out, world.random_scene(random).things))
        assert any(map(world.held_out, world.random_scene(random, unseen=True).things))


def test_every_caption_says_its_scene() -> None:
    random, said = Random(2), Counter[str]()
    for _ in range(5000):
        scene = world.random_scene(random)
        text = world.caption(scene, random)
        found = world.parse(text)
        assert found is not None
        assert (found.background, found.relation) == (scene.background, scene.relation)
        for thing, meant in zip(found.things, scene.things, strict=True):
            assert (thing.shape, thing.colour) == (meant.shape, meant.colour)
            assert thing.size in ("", meant.size)
            said["no size" if not thing.size else "size"] += 1
        assert world.parse(world.caption(scene)) == scene
    assert 0.2 < said["no size"] / said.total() < 0.3


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("A red  circle, white background.", Scene("white", (Thing("circle", "red"),))),
        (
            "an orange star to the left of a small blue ring on a gray background",
            Scene("gray", (Thing("star", "orange"), Thing("ring", "blue", "small")), "left of"),
        ),
        (
            "a large pink cross with a green square under it on a black background",
            Scene("black", (Thing("square", "green"), Thing("cross", "pink", "large")), "below"),
        ),
        ("ghibli style, a fantasy landscape with castles", None),
        ("a red circle", None),
        ("a red hexagon on a white background", None),
    ],
)
def test_captions_are_read(text: str, scene: Scene | None) -> None:
    assert world.parse(text) == scene


def test_held_out_prompts_are_the_same_every_time_all_different_and_a_longer_list_goes_on() -> None:
    prompts = world.held_out_prompts(500)
    assert len(set(prompts)) == 500
    assert world.held_out_prompts(8) == prompts[:8]
    assert prompts[0] == "a large red ring on a brown background"
    for prompt in prompts:
        scene = world.parse(prompt)
        assert scene is not None
        assert all(thing.size for thing in scene.things)


def test_objects_lie_inside_the_picture_apart_and_as_their_relation_says() -> None:
    random = Random(3)
    scenes = [world.random_scene(random, unseen=index % 2 == 0) for index in range(3000)]
    layout = arrange(scenes, torch.Generator().manual_seed(0))
    inside = (layout.centre - layout.radius[..., None] >= 2.9) & (layout.centre + layout.radius[..., None] <= 125.1)
    assert inside.all()
    for index, scene in enumerate(scenes):
        if scene.relation:
            offset = layout.centre[index, 0] - layout.centre[index, 1]
            assert offset.norm() > layout.radius[index].sum() + 5
            x, y = world.RELATIONS[scene.relation]
            towards = offset[0] * x + offset[1] * y
            assert towards > 0.7 * offset.norm()  # within 45° of where the relation points
        else:
            assert layout.radius[index, 1] == 0


def test_pictures_repeat_and_hold_the_colours_they_were_given() -> None:
    scenes = [Scene("white", (Thing("square", "blue", "large"),))]
    pictures = [draw(arrange(scenes, torch.Generator().manual_seed(5), jitter=0.0)) for _ in range(2)]
    assert torch.equal(*pictures)
    assert pictures[0].shape == (1, 3, 128, 128)
    colours = (pictures[0][0] * 255).round().flatten(1).T
    share = {
        name: (colours == torch.tensor(rgb)).all(1).float().mean().item()
        for name, rgb in (world.COLOURS | world.BACKGROUNDS).items()
    }
    # A square's side is √2 times the radius, 23 to 27 pixels, of the circle around it; its edges are of neither colour.
    assert 2 * 22**2 / 128**2 < share["blue"] < 2 * 27**2 / 128**2
    assert share["white"] > 0.9 - share["blue"]
    assert share["red"] == 0
