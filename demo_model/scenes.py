"""The demo model's training data: scenes of one or two colored shapes, their prompts, and their rendering.

Independent of models. A ``Scene`` is the content of a prompt, a ``Layout`` adds exact positions and sizes, and
``render`` makes an image of both. All lengths are fractions of the image's shorter side; y points down.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 50),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "black": (15, 15, 15),
    "beige": (235, 220, 190),
}
RADII = {"small": 0.115, "large": 0.195}
RADIUS_JITTER = 0.08
"""The maximum deviation from a nominal radius, as a fraction of it."""
POSITIONS: dict[str, tuple[float, float]] = {
    "in the center": (0.0, 0.0),
    "on the left": (-0.25, 0.0),
    "on the right": (0.25, 0.0),
    "at the top": (0.0, -0.25),
    "at the bottom": (0.0, 0.25),
    "in the top left corner": (-0.25, -0.25),
    "in the top right corner": (0.25, -0.25),
    "in the bottom left corner": (-0.25, 0.25),
    "in the bottom right corner": (0.25, 0.25),
}
"""Offset of an object's center from the image's center, (x, y)."""
RELATIONS: dict[str, tuple[float, float]] = {
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
    "to the left of": (-1.0, 0.0),
    "to the right of": (1.0, 0.0),
}
"""Direction from the second object to the first, (x, y)."""
PAIR_OFFSET = 0.245
CENTER_JITTER = 0.03
CROSS_ARM = 0.34
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Thing:
    """One object of a scene: ``a small red circle``."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing at a position, or two things in a relation (first *relation* second), and a background."""

    things: tuple[Thing, ...]
    place: str
    background: str

    @property
    def prompt(self) -> str:
        ending = f"on a {self.background} background"
        if len(self.things) == 1:
            return f"a {self.things[0]} {self.place} {ending}"
        first, second = self.things
        return f"a {first} {self.place} a {second} {ending}"

    @property
    def is_held_out(self) -> bool:
        """Whether the prompt is excluded from training, as a fixed tenth of all prompts is."""
        digest = hashlib.sha256(self.prompt.encode()).digest()
        return digest[0] < HELD_OUT_SHARE * 256


def random_scene(rng: random.Random, num_things: int) -> Scene:
    """Sample a scene uniformly; the two things of a pair have different colors."""
    colors = rng.sample(list(COLORS), num_things)
    things = tuple(Thing(rng.choice(list(RADII)), color, rng.choice(SHAPES)) for color in colors)
    places = POSITIONS if num_things == 1 else RELATIONS
    return Scene(things, rng.choice(list(places)), rng.choice(list(BACKGROUNDS)))


def scenes(rng: random.Random, count: int, num_things: int, *, held_out: bool) -> list[Scene]:
    """Sample ``count`` scenes that are all held out from training, or all not."""
    samples: list[Scene] = []
    while len(samples) < count:
        scene = random_scene(rng, num_things)
        if scene.is_held_out == held_out:
            samples.append(scene)
    return samples


@dataclass(frozen=True)
class Layout:
    """The exact position and size of each thing, which a prompt does not specify."""

    centers: tuple[tuple[float, float], ...]
    """Offsets (x, y) from the image's center."""
    radii: tuple[float, ...]


def random_layout(scene: Scene, rng: random.Random) -> Layout:
    """Sample positions and sizes that match the scene's prompt."""
    if len(scene.things) == 1:
        anchors = [POSITIONS[scene.place]]
    else:
        dx, dy = (PAIR_OFFSET * part for part in RELATIONS[scene.place])
        anchors = [(dx, dy), (-dx, -dy)]
    jitter = CENTER_JITTER
    centers = tuple((x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)) for x, y in anchors)
    radii = tuple(RADII[t.size] * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER)) for t in scene.things)
    return Layout(centers, radii)


def signed_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute signed distances to the edge of each of ``SHAPES`` with radius 1 at the origin, negative inside.

    ``x`` and ``y`` have any one shape ``[...]``; the result is ``[len(SHAPES), ...]``.
    """
    ax, ay = x.abs(), y.abs()
    side = 0.886  # the square has the circle's area
    circle = torch.hypot(x, y) - 1
    square = torch.maximum(ax, ay) - side
    triangle = torch.maximum(0.894 * ax - 0.447 * y - 0.447, y - 0.866)  # apex at the top, base at y = 0.866
    diamond = (ax + ay - 1.1) * 0.7071
    cross = torch.minimum(torch.maximum(ax - CROSS_ARM, ay - 1), torch.maximum(ay - CROSS_ARM, ax - 1))
    return torch.stack([circle, square, triangle, diamond, cross])


def shape_masks(center: tuple[float, float], radius: float, height: int, width: int) -> torch.Tensor:
    """Compute the anti-aliased coverage in 0..1 of each of ``SHAPES``: ``[len(SHAPES), height, width]``."""
    unit = min(height, width)
    rows = (torch.arange(height) + 0.5 - height / 2) / unit
    columns = (torch.arange(width) + 0.5 - width / 2) / unit
    y, x = torch.meshgrid((rows - center[1]) / radius, (columns - center[0]) / radius, indexing="ij")
    return (0.5 - signed_distances(x, y) * radius * unit).clamp(0, 1)


def render(scene: Scene, layout: Layout, height: int, width: int) -> torch.Tensor:
    """Render a scene: float32 ``[3, height, width]`` in -1..1."""
    objects = [COLORS[thing.color] for thing in scene.things]
    masks = [
        shape_masks(center, radius, height, width)[SHAPES.index(thing.shape)]
        for thing, center, radius in zip(scene.things, layout.centers, layout.radii, strict=True)
    ]
    return paint(BACKGROUNDS[scene.background], objects, masks)


def paint(
    background: tuple[int, int, int], colors: Sequence[tuple[int, int, int]], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Blend each color over the background according to its mask: float32 ``[3, height, width]`` in -1..1."""
    height, width = masks[0].shape
    image = torch.tensor(background, dtype=torch.float32).view(3, 1, 1).expand(3, height, width)
    for color, mask in zip(colors, masks, strict=True):
        image = torch.lerp(image, torch.tensor(color, dtype=torch.float32).view(3, 1, 1), mask)
    return image / 127.5 - 1
