"""A cache bounded in bytes that forgets the least recently used: prompt embeddings are large and prompts repeat."""

from collections.abc import Hashable
from threading import Lock
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache


class Sized(Protocol):
    """What the cache can hold: a tensor, or something around one."""

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""


Item = TypeVar("Item", bound=Sized)


class ByteBoundedCache(Generic[Item]):
    """Keeps items of at most ``max_bytes`` together. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._items: LRUCache[Hashable, Item] = LRUCache(max_bytes, getsizeof=lambda item: item.nbytes)
        self._lock = Lock()

    def get(self, key: Hashable) -> Item | None:
        """The item stored under ``key``, or None."""
        with self._lock:
            return self._items.get(key)

    def put(self, key: Hashable, item: Item) -> None:
        """Store ``item``; one larger than the whole cache is not kept."""
        if item.nbytes > self._items.maxsize:
            return
        with self._lock:
            self._items[key] = item

    @property
    def num_bytes(self) -> int:
        """What the cache holds now."""
        return int(self._items.currsize)
