"""Checks whether an image of the demo model shows the scene of its prompt.

Independent of models and training: it uses only the pixels, and is tested on rendered scenes.
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
"""The minimum distance of a thing's pixels from the background's color (Euclidean, 0..255)."""
COLOR_TOLERANCE = 60.0
"""The maximum distance of a color from the palette's."""
MIN_AREA = 0.006
"""The minimum area of a thing, as a share of the image."""
MIN_OVERLAP = 0.75
"""The minimum intersection over union with an ideal shape."""
POSITION_TOLERANCE = 0.1
"""The maximum offset from the prompt's position, as a share of the shorter side."""


@dataclass(frozen=True)
class Seen:
    """A thing detected in an image."""

    thing: Thing
    center: tuple[float, float]
    """The offset (x, y) from the image's center."""


@dataclass(frozen=True)
class Reading:
    """The background and the things detected in an image."""

    background: str
    seen: tuple[Seen, ...]


def read_image(image: torch.Tensor) -> Reading:
    """Detect the background and the things in ``image``, ``[3, H, W]`` in 0..255."""
    image = image.float()
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    backdrop = border.median(dim=1).values
    mask = (image - backdrop.view(3, 1, 1)).square().sum(0).sqrt() > FOREGROUND_DISTANCE
    seen = [read_thing(image, component) for component in components(mask)]
    return Reading(nearest_color(backdrop, BACKGROUNDS), tuple(seen))


def components(mask: torch.Tensor) -> list[torch.Tensor]:
    """Find the connected areas of ``mask`` ``[H, W]`` of at least ``MIN_AREA``, largest first."""
    labels, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    areas = [torch.from_numpy(labels == label) for label in range(1, count + 1)]
    large = [area for area in areas if area.sum() >= MIN_AREA * mask.numel()]
    return sorted(large, key=lambda area: -int(area.sum()))


def read_thing(image: torch.Tensor, area: torch.Tensor) -> Seen:
    """Determine color, shape, size and position of the thing that covers ``area``."""
    color = nearest_color(image[:, area].median(dim=1).values, COLORS)
    shape, radius, center = fit_shape(area)
    size = min(RADII, key=lambda name: abs(RADII[name] - radius))
    return Seen(Thing(size, color, shape), center)


def nearest_color(color: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the name of the nearest color of the palette, or ``unknown``."""
    distances = {name: (color - torch.tensor(rgb)).norm().item() for name, rgb in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= COLOR_TOLERANCE else "unknown"


def fit_shape(area: torch.Tensor) -> tuple[str, float, tuple[float, float]]:
    """Fit each shape to the bounding box of ``area``; return the one that overlaps best, its radius and its center."""
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
    """For each shape of radius 1: width, height and vertical center of its bounding box."""
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
    """List the differences between an image and its prompt."""
    wrong = [] if reading.background == scene.background else ["background"]
    if len(reading.seen) != len(scene.things):
        return [*wrong, "number of things"]
    pairs = list(zip(scene.things, in_order(scene, reading), strict=True))
    wrong += [
        attribute
        for attribute in ("color", "shape", "size")
        if any(getattr(want, attribute) != getattr(have.thing, attribute) for want, have in pairs)
    ]
    if not is_in_place(scene, [have.center for _, have in pairs]):
        wrong.append("position")
    return wrong


def in_order(scene: Scene, reading: Reading) -> list[Seen]:
    """Order the detected things as in the prompt, by their similarity to the prompt's things."""
    seen = list(reading.seen)
    if len(seen) == 1:
        return seen

    def similarity(order: list[Seen]) -> int:
        return sum(
            getattr(want, attribute) == getattr(have.thing, attribute)
            for want, have in zip(scene.things, order, strict=True)
            for attribute in ("color", "shape", "size")
        )

    return max((seen, seen[::-1]), key=similarity)


def is_in_place(scene: Scene, centers: list[tuple[float, float]]) -> bool:
    """Return whether a single thing is at its position, or the first of two in its relation to the second."""
    if len(centers) == 1:
        (x, y), (want_x, want_y) = centers[0], POSITIONS[scene.place]
        return abs(x - want_x) <= POSITION_TOLERANCE and abs(y - want_y) <= POSITION_TOLERANCE
    (x, y), (other_x, other_y) = centers
    along_x, along_y = RELATIONS[scene.place]
    along = (x - other_x) * along_x + (y - other_y) * along_y
    across = abs((x - other_x) * along_y) + abs((y - other_y) * along_x)
    return along > 2 * across and along > 2 * POSITION_TOLERANCE
