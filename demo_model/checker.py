"""Reads a picture of the demo model and says whether it shows the scene that its prompt asked for.

Knows nothing of models or training: it works on pixels alone, and is itself tested on drawn scenes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from demo_model.scenes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    shape_masks,
    signed_distances,
)

FOREGROUND_DISTANCE = 55.0
"""A pixel belongs to a thing if its color is at least this far from the background's (Euclidean, 0..255)."""
COLOR_TOLERANCE = 60.0
"""The farthest a color may lie from the one it is taken for."""
MIN_AREA = 0.006
"""Smaller specks, as a share of the picture, are no things."""
MIN_OVERLAP = 0.75
"""Intersection over union with the ideal shape, below which a thing has no shape."""
POSITION_TOLERANCE = 0.1
"""How far, in shorter sides, a thing may lie from the place it is said to be."""


@dataclass(frozen=True)
class Seen:
    """One thing as it was found; ``center`` is its offset from the picture's center, (x, y)."""

    thing: Thing
    center: tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str
    seen: tuple[Seen, ...]


def read_picture(picture: torch.Tensor) -> Reading:
    """Find background and things in ``picture``, ``[3, H, W]`` in 0..255."""
    picture = picture.float()
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    backdrop = border.median(dim=1).values
    mask = (picture - backdrop.view(3, 1, 1)).square().sum(0).sqrt() > FOREGROUND_DISTANCE
    seen = [read_thing(picture, component) for component in components(mask)]
    return Reading(nearest_color(backdrop, BACKGROUNDS), tuple(seen))


def components(mask: torch.Tensor) -> list[torch.Tensor]:
    """The connected areas of ``mask`` ``[H, W]`` that are large enough, largest first."""
    labels, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    found = [torch.from_numpy(labels == label) for label in range(1, count + 1)]
    large = [area for area in found if area.sum() >= MIN_AREA * mask.numel()]
    return sorted(large, key=lambda area: -int(area.sum()))


def read_thing(picture: torch.Tensor, area: torch.Tensor) -> Seen:
    """Colour, shape, size and place of the thing that covers ``area``."""
    color = nearest_color(picture[:, area].median(dim=1).values, COLORS)
    shape, radius, center = fit_shape(area)
    size = min(RADII, key=lambda name: abs(RADII[name] - radius))
    return Seen(Thing(size, color, shape), center)


def nearest_color(found: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    """The palette's nearest name for a color, or ``unknown``."""
    distances = {name: (found - torch.tensor(rgb)).norm().item() for name, rgb in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= COLOR_TOLERANCE else "unknown"


def fit_shape(area: torch.Tensor) -> tuple[str, float, tuple[float, float]]:
    """The shape whose ideal form, fitted to the bounding box of ``area``, overlaps it best; its radius and center."""
    height, width = area.shape
    unit = min(height, width)
    rows, columns = area.any(1).nonzero().flatten(), area.any(0).nonzero().flatten()
    top, bottom, left, right = rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1
    middle_x, middle_y = (left + right) / 2 - width / 2, (top + bottom) / 2 - height / 2
    best = ("unknown", 0.0, (middle_x / unit, middle_y / unit))
    best_overlap = MIN_OVERLAP
    for index, shape in enumerate(SHAPES):
        box_width, box_height, offset_y = SHAPE_BOXES[shape]
        radius = ((right - left) / box_width + (bottom - top) / box_height) / 2 / unit
        center = (middle_x / unit, middle_y / unit - offset_y * radius)
        ideal = shape_masks(center, radius, height, width)[index] > 0.5
        overlap = ((ideal & area).sum() / (ideal | area).sum()).item()
        if overlap > best_overlap:
            best, best_overlap = (shape, radius, center), overlap
    return best


def _shape_boxes() -> dict[str, tuple[float, float, float]]:
    """For each shape of radius 1: width and height of its bounding box, and the height of the box's center."""
    side = torch.linspace(-1.3, 1.3, 1301)
    y, x = torch.meshgrid(side, side, indexing="ij")
    boxes = {}
    for shape, distances in zip(SHAPES, signed_distances(x, y), strict=True):
        inside = distances <= 0
        ys, xs = y[inside], x[inside]
        boxes[shape] = (
            (xs.max() - xs.min()).item(),
            (ys.max() - ys.min()).item(),
            ((ys.max() + ys.min()) / 2).item(),
        )
    return boxes


SHAPE_BOXES = _shape_boxes()


def mistakes(scene: Scene, reading: Reading) -> list[str]:
    """How the picture differs from its prompt: empty if it is wholly right."""
    found = [] if reading.background == scene.background else ["background"]
    if len(reading.seen) != len(scene.things):
        return [*found, "number of things"]
    pairs = list(zip(scene.things, in_order(scene, reading), strict=True))
    found += [
        attribute
        for attribute in ("color", "shape", "size")
        if any(getattr(want, attribute) != getattr(have.thing, attribute) for want, have in pairs)
    ]
    if not is_in_place(scene, [have.center for _, have in pairs]):
        found.append("position")
    return found


def in_order(scene: Scene, reading: Reading) -> list[Seen]:
    """The things that were seen, in the order of the prompt: a pair is told apart by the things themselves."""
    seen = list(reading.seen)
    if len(seen) == 1:
        return seen

    def likeness(order: list[Seen]) -> int:
        return sum(
            getattr(want, attribute) == getattr(have.thing, attribute)
            for want, have in zip(scene.things, order, strict=True)
            for attribute in ("color", "shape", "size")
        )

    return max((seen, seen[::-1]), key=likeness)


def is_in_place(scene: Scene, centers: list[tuple[float, float]]) -> bool:
    """Whether one thing is at its position, or the first of two lies as the relation says."""
    if len(centers) == 1:
        (x, y), (want_x, want_y) = centers[0], POSITIONS[scene.place]
        return abs(x - want_x) <= POSITION_TOLERANCE and abs(y - want_y) <= POSITION_TOLERANCE
    (x, y), (other_x, other_y) = centers
    along_x, along_y = RELATIONS[scene.place]
    along = (x - other_x) * along_x + (y - other_y) * along_y
    across = abs((x - other_x) * along_y) + abs((y - other_y) * along_x)
    return along > 2 * across and along > 2 * POSITION_TOLERANCE
