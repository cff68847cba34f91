"""Shape buckets: the few shapes of forward passes, so that each can be compiled at startup.

A batch is padded to the next batch size, and its prompts to the next length. Independent of torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

NUM_LENGTHS = 4
"""The number of equally spaced lengths: 128, 256, 384 and 512 tokens for FLUX.2 [dev].

More would gain little: on a large GPU a pass over fewer than about 160 tokens is bound by reading the weights. With
batches of 1, 2, 4 and 8 there are 16 shapes, far below ``flux2_shared.model.compilation.MAX_SHAPES``.
"""


@dataclass(frozen=True)
class ShapeBuckets:
    """Batch sizes and lengths in tokens, both ascending; every pair is a shape."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def up_to(cls, max_batch: int, max_length: int) -> Self:
        """Create buckets for batch sizes of powers of two and ``max_batch``, and ``NUM_LENGTHS`` lengths."""
        powers = (2**k for k in range(max_batch.bit_length()) if 2**k < max_batch)
        return cls((*powers, max_batch), tuple(max_length * part // NUM_LENGTHS for part in range(1, NUM_LENGTHS + 1)))

    def untrimmed(self) -> Self:
        """Return the buckets with the same batch sizes and the full length only."""
        return replace(self, lengths=self.lengths[-1:])

    def bucket_for(self, num_prompts: int, num_tokens: int) -> tuple[int, int]:
        """Return the smallest shape for ``num_prompts`` prompts of at most ``num_tokens``; a larger batch is kept."""
        batch = next((size for size in self.batches if size >= num_prompts), num_prompts)
        return batch, next(length for length in self.lengths if length >= num_tokens)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((batch, length) for batch in self.batches for length in self.lengths)

    def __len__(self) -> int:
        return len(self.batches) * len(self.lengths)
