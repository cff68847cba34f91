"""Builds small ICC profiles (ICC.1:2001-04), because Pillow can create only sRGB."""

import struct
from collections.abc import Mapping, Sequence


def matrix_profile(columns: Sequence[Sequence[float]], gamma: float) -> bytes:
    """Return an RGB display profile with the given XYZ (D50) of each primary, and one gamma for all channels."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)
    primaries = {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    return profile(b"RGB ", b"XYZ ", primaries | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def gray_profile(gamma: float) -> bytes:
    """Return a grayscale profile with one gamma."""
    return profile(b"GRAY", b"XYZ ", {b"kTRC": b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)})


def cmyk_profile(lightness_of_black: int) -> bytes:
    """Return a CMYK profile without hue: every ink darkens, and K alone gives ``lightness_of_black`` (L*, 0 to 100)."""
    ramp = bytes(range(256))
    corners = bytearray()
    for corner in range(16):  # the last ink, K, varies fastest
        cmy = (corner >> 1).bit_count()
        lightness = min(100 - 33 * cmy, lightness_of_black if corner & 1 else 100)
        corners += bytes((round(max(lightness, 0) * 2.55), 128, 128))
    identity = struct.pack(">9I", *(65536 * (k in (0, 4, 8)) for k in range(9)))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + corners + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": lut}, device=b"prtr")


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def profile(space: bytes, connection: bytes, tags: Mapping[bytes, bytes], device: bytes = b"mntr") -> bytes:
    """Assemble a profile from its tags."""
    name = b"a test profile\0"
    description = b"desc" + struct.pack(">II", 0, len(name)) + name + bytes(78)
    every = {b"desc": description, b"wtpt": xyz((0.9642, 1.0, 0.8249)), **tags}
    table, data = bytearray(struct.pack(">I", len(every))), bytearray()
    start = 128 + 4 + 12 * len(every)
    for signature, content in every.items():
        table += signature + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(data), bytes(4), 0x02400000, device, space, connection)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + bytes(table) + bytes(data)
