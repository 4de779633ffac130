"""Read a picture of the small world back, and say whether it shows what its caption says.

Colours are compared in CIE Lab. An object is a connected region that isn't background. Its shape is told by three
figures that don't change with its place, size or rotation: how much of it is hole, how much of its convex hull it
fills, and how much of the circle around it.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2lab
from skimage.filters import gaussian
from skimage.measure import label, regionprops
from skimage.morphology import disk, erosion

from diffusion_fast.world import BACKGROUNDS, COLOURS, RELATIONS, SIZES, Rgb, Scene, Thing

FRAME = 4  # pixels along the edges that show the background
LEAST_AREA = 40  # pixels; less is a speck
EDGE = 0.5  # of the way from the background's colour to the object's: where its edge is
SMOOTHING = 0.5  # standard deviation in pixels: takes off noise and leaves the corners
VISIBLE = 12.0  # distance in Lab from the background: what is farther is something
COLOUR_TOLERANCE = 26.0  # distance in Lab: farther from every name, a colour has none
MIXED = 0.1  # of an object in another colour of the palette: with more it has none
SHAPE_TOLERANCE = 0.13  # distance from every shape's figures: farther is no shape
BIG_FROM = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius in pixels


# Each shape's hole (of its filled area), solidity (of its convex hull) and fill (of the circle around it), as they are
# read from pixels, which round off corners: a little off what geometry says.
FIGURES = {
    "circle": (0.0, 0.98, 0.945),
    "square": (0.0, 0.965, 0.645),
    "triangle": (0.0, 0.94, 0.435),
    "star": (0.0, 0.56, 0.41),
    "ring": (0.295, 0.98, 0.945),
    "cross": (0.0, 0.715, 0.61),
}


@dataclass(frozen=True)
class Seen:
    """An object in a picture; `colour` or `shape` is "" where it has no name. Centre and radius are in pixels."""

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its scene, and in a few words what was seen instead."""

    right: bool
    reason: str = ""


def judge(picture: NDArray[Any], scene: Scene) -> Verdict:
    """Compare a picture, (height, width, 3) in 0..255 or 0..1, with the scene that it should show.

    Right means: the background's colour, exactly these objects, each with its shape, its colour and, where the scene
    gives one, its size, and the relation between them.
    """
    background, seen = read(picture)
    if background != scene.background:
        return Verdict(False, f"a {background or 'nameless'} background")
    if len(seen) != len(scene.things):
        return Verdict(False, f"{len(seen)} objects: {_list(seen)}" if seen else "no objects")
    matching = [
        order
        for order in itertools.permutations(seen)
        if all(_is(found.thing, wanted) for found, wanted in zip(order, scene.things, strict=True))
    ]
    if not matching:
        return Verdict(False, _list(seen))
    if scene.relation and not any(_relation(*order) == scene.relation for order in matching):
        return Verdict(False, f"the first is {_relation(*matching[0])} the second")
    return Verdict(True)


def read(picture: NDArray[Any]) -> tuple[str, list[Seen]]:
    """The background's colour and the objects of a picture, (height, width, 3) in 0..255 or 0..1."""
    if picture.dtype == np.uint8:
        picture = picture / 255.0
    lab = rgb2lab(gaussian(picture.astype(np.float32), SMOOTHING, channel_axis=2))
    frame = np.ones(lab.shape[:2], dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    ground = np.median(lab[frame], axis=0)
    off = np.linalg.norm(lab - ground, axis=2)
    seen = []
    for rough in regionprops(label(off > VISIBLE)):
        if rough.area < LEAST_AREA:
            continue
        inner = erosion(np.pad(rough.image, 1), disk(2))[1:-1, 1:-1]
        within = lab[rough.slice][inner if inner.any() else rough.image]
        colour = np.median(within, axis=0)
        name = _name(colour, COLOURS)
        if name and _share_of_others(within, name) > MIXED:
            name = ""
        # Halfway to the object's own colour is where its edge is, whatever the two colours are.
        inside = rough.image & (off[rough.slice] > EDGE * np.linalg.norm(colour - ground))
        for part in regionprops(label(inside)):
            if part.area >= LEAST_AREA:
                seen.append(_see(part, name, rough.bbox[:2]))
    return _name(ground, BACKGROUNDS), seen


def _see(part: Any, colour: str, corner: tuple[int, int]) -> Seen:
    rows, columns = part.coords.T
    middle = np.array(part.centroid)
    if part.area_filled > part.area:  # of a ring with a flaw in it the filled one has the truer centre
        middle = np.argwhere(part.image_filled).mean(0) + part.bbox[:2]
    # Half a pixel more: from the centre of the outermost pixel to its edge.
    radius = float(np.hypot(rows - middle[0], columns - middle[1]).max()) + 0.5
    figures = np.array(
        [
            1 - part.area / part.area_filled,
            part.area_filled / part.area_convex,
            part.area_filled / (math.pi * radius**2),
        ]
    )
    distances = {shape: float(np.linalg.norm(figures - known)) for shape, known in FIGURES.items()}
    nearest = min(distances, key=lambda shape: distances[shape])
    shape = nearest if distances[nearest] <= SHAPE_TOLERANCE else ""
    size = "large" if radius > BIG_FROM else "small"
    y, x = middle + corner + 0.5
    return Seen(Thing(shape, colour, size), float(x), float(y), radius)


def _name(lab: NDArray[Any], palette: dict[str, Rgb]) -> str:
    """The nearest name in the palette; "" where none is near, or a colour of the other palette is nearer."""
    distances = {name: float(np.linalg.norm(lab - _lab(rgb))) for name, rgb in (COLOURS | BACKGROUNDS).items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= COLOUR_TOLERANCE and nearest in palette else ""


def _share_of_others(pixels: NDArray[Any], name: str) -> float:
    """Of an object's pixels in Lab, (n, 3): how many have another colour of the palette. A blurred edge has none."""
    distances = np.stack([np.linalg.norm(pixels - _lab(rgb), axis=1) for rgb in COLOURS.values()])
    others = (distances.min(0) <= COLOUR_TOLERANCE) & (distances.argmin(0) != list(COLOURS).index(name))
    return float(others.mean())


@functools.cache
def _lab(rgb: Rgb) -> NDArray[np.float64]:
    known: NDArray[np.float64] = rgb2lab(np.array(rgb) / 255.0)
    return known


def _is(found: Thing, wanted: Thing) -> bool:
    same = (found.shape, found.colour) == (wanted.shape, wanted.colour)
    return same and wanted.size in ("", found.size)


def _relation(first: Seen, second: Seen) -> str:
    """Where the first is, seen from the second: the relation whose direction is nearest."""
    across, down = first.x - second.x, first.y - second.y
    return max(RELATIONS, key=lambda name: across * RELATIONS[name][0] + down * RELATIONS[name][1])


def _list(seen: list[Seen]) -> str:
    return ", ".join(str(Thing(each.thing.shape or "blob", each.thing.colour, each.thing.size)) for each in seen)
