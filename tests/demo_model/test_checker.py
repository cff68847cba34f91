"""The checker itself, on images with known content."""

import random

import pytest
import torch

from demo_model.checker import mistakes, read_image
from demo_model.scenes import Scene, Thing, random_layout, render, scenes


def ideal_image(scene: Scene, seed: int = 0, side: int = 128) -> torch.Tensor:
    """The ideal image of a scene, with values of 0 to 255."""
    return (render(scene, random_layout(scene, random.Random(seed)), side, side) + 1) * 127.5


@pytest.mark.parametrize("side", [128, 256])
@pytest.mark.parametrize("num_things", [1, 2])
def test_ideal_images_have_no_mistakes(num_things: int, side: int) -> None:
    """Every rendered scene is read back without a mistake."""
    for seed, scene in enumerate(scenes(random.Random(1), 100, num_things, held_out=True)):
        assert mistakes(scene, read_image(ideal_image(scene, seed, side))) == []


def test_noise_does_not_disturb() -> None:
    """Noise of 8 levels and soft edges do not change the result."""
    noise = torch.Generator().manual_seed(0)
    for seed, scene in enumerate(scenes(random.Random(2), 60, 2, held_out=False)):
        image = ideal_image(scene, seed) + 8 * torch.randn(3, 128, 128, generator=noise)
        assert mistakes(scene, read_image(image)) == []


@pytest.mark.parametrize(
    ("other", "mistake"),
    [
        (Scene((Thing("small", "red", "circle"),), "on the left", "black"), "background"),
        (Scene((Thing("small", "orange", "circle"),), "on the left", "white"), "color"),
        (Scene((Thing("small", "red", "diamond"),), "on the left", "white"), "shape"),
        (Scene((Thing("large", "red", "circle"),), "on the left", "white"), "size"),
        (Scene((Thing("small", "red", "circle"),), "on the right", "white"), "position"),
        (
            Scene((Thing("small", "red", "circle"), Thing("small", "blue", "circle")), "above", "white"),
            "number of things",
        ),
    ],
)
def test_each_mistake_is_reported(other: Scene, mistake: str) -> None:
    """The image of another scene is wrong only in what differs."""
    wanted = Scene((Thing("small", "red", "circle"),), "on the left", "white")
    assert mistakes(wanted, read_image(ideal_image(other))) == [mistake]


def test_a_swapped_pair_is_a_mistake_of_position() -> None:
    """A pair in the position "above" is not right for "below"."""
    pair = (Thing("small", "red", "circle"), Thing("large", "blue", "square"))
    wanted, got = Scene(pair, "above", "white"), Scene(pair, "below", "white")
    assert mistakes(wanted, read_image(ideal_image(got))) == ["position"]


def test_swapped_colors_are_wrong() -> None:
    """A pair with exchanged colors is wrong."""
    wanted = Scene((Thing("small", "red", "circle"), Thing("small", "blue", "square")), "above", "white")
    got = Scene((Thing("small", "blue", "circle"), Thing("small", "red", "square")), "above", "white")
    assert mistakes(wanted, read_image(ideal_image(got)))


def test_an_empty_image_has_no_objects() -> None:
    """A plain image has a background and no objects."""
    reading = read_image(torch.full((3, 128, 128), 250.0))
    assert (reading.background, reading.seen) == ("white", ())


def test_held_out_prompts_are_a_fixed_tenth() -> None:
    """Held-out scenes are about a tenth of all, and never in the training set."""
    rng = random.Random(3)
    sample = [scene for n in (1, 2) for held in (True, False) for scene in scenes(rng, 50, n, held_out=held)]
    assert sum(scene.is_held_out for scene in sample) == 100
    assert {s.prompt for s in sample if s.is_held_out}.isdisjoint(s.prompt for s in sample if not s.is_held_out)
