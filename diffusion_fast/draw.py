"""Scenes of the small world as pictures, many at a time, on whatever device torch has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_fast.world import BACKGROUNDS, CANVAS, COLOURS, RELATIONS, SHAPES, SIZES, Scene

if TYPE_CHECKING:
    import torch

MARGIN = 3.0  # between an object and the canvas's edge, pixels
GAP = (7.0, 16.0)  # between two objects
ANGLE = math.radians(8)  # an object is turned by at most so much
# In units of the radius of the circle around the object.
RING_HOLE = 0.55
STAR_WAIST = 0.40
CROSS_ARM = 0.30  # half of an arm's width


@dataclass(frozen=True)
class Layout:
    """Where the objects of n scenes are. Scenes of one object have a second one of radius 0.

    shape (n, 2) as indices into SHAPES; colour (n, 2, 3) and background (n, 3) in 0..1; centre (n, 2, 2) as (x, y),
    radius (n, 2) in pixels; angle (n, 2) in radians.
    """

    shape: torch.Tensor
    colour: torch.Tensor
    background: torch.Tensor
    centre: torch.Tensor
    radius: torch.Tensor
    angle: torch.Tensor

    def __getitem__(self, which: slice | torch.Tensor) -> Layout:
        return Layout(**{name: value[which] for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> Layout:
        return Layout(**{name: value.to(device) for name, value in vars(self).items()})


def arrange(scenes: list[Scene], generator: torch.Generator, jitter: float = 6.0) -> Layout:
    """Place each scene's objects at random, as its relation says. Colours vary by `jitter` of 255, on the CPU."""
    import torch

    def random(low: float | torch.Tensor, high: float | torch.Tensor, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    count = len(scenes)
    pairs = [(*scene.things, *scene.things)[:2] for scene in scenes]  # the second of one is a copy, of radius 0
    two = torch.tensor([len(scene.things) == 2 for scene in scenes])
    shape = torch.tensor([[SHAPES.index(thing.shape) for thing in pair] for pair in pairs])
    colour = torch.tensor([[COLOURS[thing.colour] for thing in pair] for pair in pairs]) / 255
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]) / 255
    ranges = torch.tensor([[SIZES[thing.size] for thing in pair] for pair in pairs])
    radius = random(ranges[..., 0], ranges[..., 1], count, 2)
    radius[~two, 1] = 0.0

    # Along the axis of the relation both objects and the gap between them are one bar, moved to where there is room.
    towards = torch.tensor([RELATIONS.get(scene.relation, (0, 0)) for scene in scenes], dtype=torch.float32)
    span = 2 * radius.sum(1)
    room = CANVAS - 2 * MARGIN
    gap = random(torch.full((count,), GAP[0]), (room - span).clamp(GAP[0], GAP[1]), count)
    distance = radius.sum(1) + gap
    start = random(torch.full((count,), MARGIN), CANVAS - MARGIN - span - gap, count)
    # The first object comes first along the axis where the relation points to smaller coordinates.
    first_is_low = towards.sum(1) < 0
    near = torch.where(first_is_low, radius[:, 0], radius[:, 1])
    low, high = start + near, start + near + distance
    along = torch.stack((torch.where(first_is_low, low, high), torch.where(first_is_low, high, low)), 1)
    # Across it they are near the middle, never so far apart that the other direction would be the greater one.
    across = CANVAS / 2 + random(-0.15, 0.15, count, 2) * distance[:, None] + random(-10.0, 10.0, count, 1)
    across = across.maximum(radius + MARGIN).minimum(CANVAS - MARGIN - radius)
    upright = (towards[:, 1] != 0)[:, None]
    pair_centre = torch.stack((torch.where(upright, across, along), torch.where(upright, along, across)), 2)
    alone = random(-1.0, 1.0, count, 1, 2) * (CANVAS / 2 - MARGIN - radius[:, :1, None]).clamp(max=22) + CANVAS / 2
    centre = torch.where(two[:, None, None], pair_centre, alone.expand(count, 2, 2))

    return Layout(
        shape=shape,
        colour=(colour + random(-jitter, jitter, count, 2, 3) / 255).clamp(0, 1),
        background=(background + random(-jitter, jitter, count, 3) / 255).clamp(0, 1),
        centre=centre,
        radius=radius,
        angle=random(-ANGLE, ANGLE, count, 2),
    )


def draw(layout: Layout) -> torch.Tensor:
    """The pictures: (n, 3, 128, 128) in 0..1, on the layout's device, with edges one pixel wide."""
    import torch

    at = torch.arange(CANVAS, device=layout.radius.device) + 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    picture = layout.background[:, :, None, None].expand(-1, -1, CANVAS, CANVAS)
    for index in (1, 0):
        across, down = (layout.centre[:, index, axis, None, None] for axis in (0, 1))
        cos, sin = (f(layout.angle[:, index, None, None]) for f in (torch.cos, torch.sin))
        u = cos * (x - across) + sin * (y - down)
        v = cos * (y - down) - sin * (x - across)
        outside = _distances(u, v, layout.radius[:, index, None, None])
        chosen = layout.shape[:, index, None, None, None].expand(-1, 1, CANVAS, CANVAS)
        inside = (0.5 - outside.gather(1, chosen)).clamp(0, 1) * (layout.radius[:, index, None, None, None] > 0)
        picture = picture + inside * (layout.colour[:, index, :, None, None] - picture)
    return picture


def _distances(u: torch.Tensor, v: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """How far each pixel is outside of each of SHAPES, in pixels, negative inside: (n, 6, height, width).

    Near an edge, where it matters, these are distances; far from one they only have the right sign.
    Polygons as in https://iquilezles.org/articles/distfunctions2d: the plane is folded until one edge is left.
    """
    import torch

    far = torch.hypot(u, v)
    square = torch.maximum(u.abs(), v.abs()) - r * math.sqrt(0.5)
    triangle = torch.maximum(v, math.cos(math.pi / 6) * u.abs() - 0.5 * v) - 0.5 * r
    # A star's edge goes from its tip, at the angle 0, to its waist, at 36°.
    tenth = math.pi / 5
    turned = torch.atan2(u, -v)
    folded = (torch.remainder(turned + tenth, 2 * tenth) - tenth).abs()
    edge_x, edge_y = STAR_WAIST * math.cos(tenth) - 1, STAR_WAIST * math.sin(tenth)
    length = math.hypot(edge_x, edge_y)
    star = (far * torch.sin(folded) * -edge_x + (far * torch.cos(folded) - r) * edge_y) / length
    ring = (far - r * (1 + RING_HOLE) / 2).abs() - r * (1 - RING_HOLE) / 2
    arm = r * math.sqrt(1 - CROSS_ARM**2)
    cross = torch.minimum(
        torch.maximum(u.abs() - arm, v.abs() - CROSS_ARM * r), torch.maximum(v.abs() - arm, u.abs() - CROSS_ARM * r)
    )
    return torch.stack((far - r, square, triangle, star, ring, cross), 1)
