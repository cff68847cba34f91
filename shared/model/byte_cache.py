"""An LRU cache whose size is limited in bytes, for prompt embeddings."""

from collections.abc import Hashable
from threading import Lock
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache


class Sized(Protocol):
    """An item of the cache, such as a tensor."""

    @property
    def nbytes(self) -> int:
        """The item's size in bytes."""


Item = TypeVar("Item", bound=Sized)


class ByteBoundedCache(Generic[Item]):
    """A thread-safe LRU cache of items that take at most ``max_bytes`` in total."""

    def __init__(self, max_bytes: int) -> None:
        self._items: LRUCache[Hashable, Item] = LRUCache(max_bytes, getsizeof=lambda item: item.nbytes)
        self._lock = Lock()

    def get(self, key: Hashable) -> Item | None:
        with self._lock:
            return self._items.get(key)

    def __contains__(self, key: Hashable) -> bool:
        """Return whether an item is cached, without counting as a use of it."""
        with self._lock:
            return key in self._items

    def put(self, key: Hashable, item: Item) -> None:
        """Store ``item``, unless it is larger than the whole cache."""
        if item.nbytes > self._items.maxsize:
            return
        with self._lock:
            self._items[key] = item

    @property
    def num_bytes(self) -> int:
        """The total size of the cached items."""
        return int(self._items.currsize)
