"""The checker itself, on pictures whose content is known."""

import random

import pytest
import torch

from demo_model.checker import mistakes, read_image
from demo_model.scenes import Scene, Thing, random_layout, render, scenes


def drawn(scene: Scene, seed: int = 0, side: int = 128) -> torch.Tensor:
    """The ideal picture of a scene, 0..255."""
    return (render(scene, random_layout(scene, random.Random(seed)), side, side) + 1) * 127.5


@pytest.mark.parametrize("side", [128, 256])
@pytest.mark.parametrize("num_things", [1, 2])
def test_ideal_pictures_are_right(num_things: int, side: int) -> None:
    """Every drawn scene is read back without a mistake."""
    for seed, scene in enumerate(scenes(random.Random(1), 100, num_things, held_out=True)):
        assert mistakes(scene, read_image(drawn(scene, seed, side))) == []


def test_noise_does_not_disturb() -> None:
    """Noise of 8 levels and soft edges change no reading."""
    noise = torch.Generator().manual_seed(0)
    for seed, scene in enumerate(scenes(random.Random(2), 60, 2, held_out=False)):
        picture = drawn(scene, seed) + 8 * torch.randn(3, 128, 128, generator=noise)
        assert mistakes(scene, read_image(picture)) == []


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
def test_each_mistake_is_named(other: Scene, mistake: str) -> None:
    """A picture of something else is wrong in just what differs."""
    wanted = Scene((Thing("small", "red", "circle"),), "on the left", "white")
    assert mistakes(wanted, read_image(drawn(other))) == [mistake]


def test_a_pair_the_wrong_way_round_is_out_of_position() -> None:
    """Above is not below."""
    pair = (Thing("small", "red", "circle"), Thing("large", "blue", "square"))
    wanted, got = Scene(pair, "above", "white"), Scene(pair, "below", "white")
    assert mistakes(wanted, read_image(drawn(got))) == ["position"]


def test_swapped_colors_are_wrong() -> None:
    """A pair whose colors are exchanged is not right."""
    wanted = Scene((Thing("small", "red", "circle"), Thing("small", "blue", "square")), "above", "white")
    got = Scene((Thing("small", "blue", "circle"), Thing("small", "red", "square")), "above", "white")
    assert mistakes(wanted, read_image(drawn(got)))


def test_an_empty_picture_shows_nothing() -> None:
    """A plain picture has a background and no things."""
    reading = read_image(torch.full((3, 128, 128), 250.0))
    assert (reading.background, reading.seen) == ("white", ())


def test_held_out_prompts_are_a_fixed_tenth() -> None:
    """Held-out scenes are about a tenth of all, and never among the training's."""
    rng = random.Random(3)
    sample = [scene for n in (1, 2) for held in (True, False) for scene in scenes(rng, 50, n, held_out=held)]
    assert sum(scene.is_held_out for scene in sample) == 100
    assert {s.prompt for s in sample if s.is_held_out}.isdisjoint(s.prompt for s in sample if not s.is_held_out)
