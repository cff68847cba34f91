"""The shapes that are compiled at start."""

import pytest

from flux2_shared.model.compilation import MAX_SHAPES
from text_encoder_service.shapes import ShapeBuckets


@pytest.mark.parametrize(
    ("max_batch", "batches"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))]
)
def test_batches_are_powers_of_two_and_the_largest(max_batch: int, batches: tuple[int, ...]) -> None:
    """There are few sizes of batches, up to the largest that is configured."""
    assert ShapeBuckets.up_to(max_batch, 512).batches == batches


def test_the_smallest_bucket_that_fits_is_used() -> None:
    """A batch is padded to the next size; one that is larger than all sizes stays unchanged."""
    shapes = ShapeBuckets.up_to(6, 512)
    assert [shapes.bucket_for(batch, 512)[0] for batch in (1, 2, 3, 4, 5, 6, 7)] == [1, 2, 4, 4, 6, 6, 7]
    assert [shapes.bucket_for(1, tokens)[1] for tokens in (1, 128, 129, 384, 512)] == [128, 128, 256, 384, 512]
    assert len(list(shapes)) == len(shapes)


def test_the_number_of_shapes_is_small() -> None:
    """All shapes of large batches stay compiled side by side."""
    assert len(ShapeBuckets.up_to(8, 512)) == 16
    assert len(ShapeBuckets.up_to(1024, 512)) < MAX_SHAPES
