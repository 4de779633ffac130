"""The small world of the bundled model: its scenes, the captions that say them, and which of them are held out.

A scene is one object, or two in a relation, on a background. The model has seen each shape in each colour, each colour
in each size and so on, but never the objects of `held_out`: painting them takes putting together what it knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

Rgb = tuple[int, int, int]

CANVAS = 128  # pixels, both ways
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS: dict[str, Rgb] = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (35, 150, 60),
    "cyan": (60, 205, 220),
    "blue": (35, 70, 215),
    "purple": (125, 45, 165),
    "pink": (250, 135, 190),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
    "brown": (105, 65, 35),
}
SIZES = {"small": (14.0, 17.0), "large": (23.0, 27.0)}  # radius of the circle around an object, pixels
# Where the first object is, seen from the second: (x, y) with y downwards. The first phrase of each is the plain one.
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
PHRASES = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
ONE = ("{a} on a {background} background", "on a {background} background, {a}", "{a}, {background} background")
TWO = (
    "{a} {relation} {b} on a {background} background",
    "on a {background} background, {a} {relation} {b}",
    "{a} {relation} {b}, {background} background",
    "{b} with {a} {relation} it on a {background} background",
)


@dataclass(frozen=True)
class Thing:
    """An object. Without a size it may have either."""

    shape: str
    colour: str
    size: str = ""

    def __str__(self) -> str:
        words = " ".join(filter(None, (self.size, self.colour, self.shape)))
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """One object, or two of which the first is `relation` the second: above, below, left of or right of it."""

    background: str
    things: tuple[Thing, ...]
    relation: str = ""


def held_out(thing: Thing) -> bool:
    """Whether the model has never seen this object: 9 of the 96, with each shape and each colour among them."""
    shape, colour, size = (
        list(names).index(name) for names, name in ((SHAPES, thing.shape), (COLOURS, thing.colour), (SIZES, thing.size))
    )
    return (shape + colour + 6 * size) % 10 == 0


THINGS = tuple(Thing(shape, colour, size) for shape in SHAPES for colour in COLOURS for size in SIZES)
SEEN = tuple(thing for thing in THINGS if not held_out(thing))
UNSEEN = tuple(thing for thing in THINGS if held_out(thing))


def random_scene(random: Random, unseen: bool = False) -> Scene:
    """A scene of objects that are seen in training or, with `unseen`, one with at least one that is not."""
    background = random.choice(list(BACKGROUNDS))
    first = random.choice(UNSEEN if unseen else SEEN)
    if random.random() < 0.3:
        return Scene(background, (first,))
    # Two objects that differ in size alone would be hard to tell apart for whoever reads a caption without sizes.
    others = [
        thing for thing in (THINGS if unseen else SEEN) if (thing.shape, thing.colour) != (first.shape, first.colour)
    ]
    things = [first, random.choice(others)]
    random.shuffle(things)
    return Scene(background, tuple(things), random.choice(list(RELATIONS)))


def caption(scene: Scene, random: Random | None = None) -> str:
    """A caption of the scene: the plainest, or with `random` one of all phrasings, some of which leave sizes out."""
    templates = ONE if len(scene.things) == 1 else TWO
    template, phrase = templates[0], PHRASES[scene.relation][0] if scene.relation else ""
    things = list(scene.things)
    if random is not None:
        template = random.choice(templates)
        phrase = random.choice(PHRASES[scene.relation]) if scene.relation else ""
        things = [replace(thing, size="") if random.random() < 0.25 else thing for thing in things]
    said = dict(zip("ab", map(str, things), strict=False))
    return template.format(**said, relation=phrase, background=scene.background)


def parse(text: str) -> Scene | None:
    """The scene that a caption says; None where it isn't one of this world's."""
    for pattern in _PATTERNS:
        if found := pattern.fullmatch(" ".join(text.lower().split()).rstrip(".")):
            said = found.groupdict()
            things = tuple(
                Thing(said[f"shape_{which}"], said[f"colour_{which}"], said[f"size_{which}"] or "")
                for which in "ab"
                if f"shape_{which}" in said
            )
            phrase = said.get("relation")
            relation = next((name for name, phrases in PHRASES.items() if phrase in phrases), "")
            return Scene(said["background"], things, relation)
    return None


def _patterns() -> Iterator[re.Pattern[str]]:
    one_of = "|".join
    phrases = one_of(phrase for several in PHRASES.values() for phrase in several)
    parts = {
        which: rf"an? (?:(?P<size_{which}>{one_of(SIZES)}) )?"
        rf"(?P<colour_{which}>{one_of(COLOURS)}) (?P<shape_{which}>{one_of(SHAPES)})"
        for which in "ab"
    }
    parts |= {"relation": f"(?P<relation>{phrases})", "background": f"(?P<background>{one_of(BACKGROUNDS)})"}
    for template in (*ONE, *TWO):
        yield re.compile(template.format(**parts))


_PATTERNS = tuple(_patterns())


def held_out_prompts(count: int) -> tuple[str, ...]:
    """The first `count` of a fixed sequence of captions, all different, each with an object the model never saw."""
    random, found = Random(0), dict[str, None]()
    while len(found) < count:
        found[caption(random_scene(random, unseen=True))] = None
    return tuple(found)
