"""The cache that is bounded by bytes."""

from dataclasses import dataclass

from flux2_shared.model.byte_cache import ByteBoundedCache


@dataclass(frozen=True)
class Lump:
    """An item of a given size."""

    nbytes: int


def test_the_least_recently_used_item_is_evicted() -> None:
    """The cache never exceeds its bytes; the least recently used item is evicted first."""
    cache = ByteBoundedCache[Lump](100)
    for name in "abc":
        cache.put(name, Lump(40))
        cache.get("a")
    assert cache.num_bytes == 80
    assert cache.get("a") == Lump(40)
    assert cache.get("b") is None
    assert cache.get("c") == Lump(40)


def test_an_item_larger_than_the_cache_is_not_stored() -> None:
    """An item larger than the whole cache is not stored, and evicts nothing."""
    cache = ByteBoundedCache[Lump](100)
    cache.put("small", Lump(60))
    cache.put("large", Lump(101))
    assert cache.get("large") is None
    assert cache.get("small") == Lump(60)
