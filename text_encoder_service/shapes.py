"""The shapes of forward passes that are known ahead, so that each is compiled once, at the start.

A batch is padded to the next of a few sizes, and its prompts to the next of a few lengths. Knows no tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

NUM_LENGTHS = 4
"""Into so many equal parts the longest prompt's length is divided: 128, 256, 384 and 512 tokens for FLUX.2 [dev].

More would pay little: on a large GPU a pass over fewer than some 160 tokens takes as long as reading the weights does.
With batches of 1, 2, 4 and 8 these are 16 shapes, far below ``shared.compilation.MAX_SHAPES``.
"""


@dataclass(frozen=True)
class ShapeBuckets:
    """Batch sizes and lengths in tokens, both ascending; every pair of them is a shape."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def up_to(cls, max_batch: int, max_length: int) -> Self:
        """Batches of powers of two and of ``max_batch``, lengths that divide ``max_length`` evenly."""
        powers = (2**k for k in range(max_batch.bit_length()) if 2**k < max_batch)
        return cls((*powers, max_batch), tuple(max_length * part // NUM_LENGTHS for part in range(1, NUM_LENGTHS + 1)))

    def untrimmed(self) -> Self:
        """The same batches, all of the full length."""
        return replace(self, lengths=self.lengths[-1:])

    def bucket_for(self, num_prompts: int, num_tokens: int) -> tuple[int, int]:
        """The smallest shape for so many prompts, the longest of so many tokens; a larger batch stays as it is."""
        batch = next((size for size in self.batches if size >= num_prompts), num_prompts)
        return batch, next(length for length in self.lengths if length >= num_tokens)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((batch, length) for batch in self.batches for length in self.lengths)

    def __len__(self) -> int:
        return len(self.batches) * len(self.lengths)
