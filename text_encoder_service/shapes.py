"""The shapes of forward passes that are known ahead, so that each is compiled once, at the start.

A batch is padded to the next of a few sizes, and its prompts to the next of a few lengths. Knows no tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Shapes:
    """Batch sizes and lengths in tokens, both ascending; every pair of them is a shape."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def up_to(cls, max_batch: int, max_length: int) -> Self:
        """Batches of powers of two and of ``max_batch``, all of the full length."""
        powers = (2**k for k in range(max_batch.bit_length()) if 2**k < max_batch)
        return cls((*powers, max_batch), (max_length,))

    def fitting(self, num_prompts: int, num_tokens: int) -> tuple[int, int]:
        """The smallest shape for so many prompts, the longest of so many tokens; a larger batch stays as it is."""
        batch = next((size for size in self.batches if size >= num_prompts), num_prompts)
        return batch, next(length for length in self.lengths if length >= num_tokens)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((batch, length) for batch in self.batches for length in self.lengths)

    def __len__(self) -> int:
        return len(self.batches) * len(self.lengths)
