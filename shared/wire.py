"""Serialization of tensors. The only module that deserializes them; all input is untrusted.

Nothing is unpickled: torch's restricted unpickler runs no code of the sender, but calls every function of its
allow-list, which allocates memory without limit and builds objects other than plain tensors. What ``torch.save`` writes
for a plain tensor is one sequence of opcodes; ``parse_torch`` compares with it, and reads the values from the archive.
"""

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from flux2_shared.model.cpu_tensors import compact, is_finite

TORCH_MEDIA_TYPE = "application/octet-stream"
SAFETENSORS_MEDIA_TYPE = "application/vnd.safetensors"
TENSOR_NAME = "prompt_embeds"
"""The tensor's key in a safetensors body."""
MAX_HEADER_BYTES = 4096
"""The most bytes of a serialized tensor besides its data."""
MAX_MEMBERS = 16
MAX_PICKLE_BYTES = 1024
"""The pickle of a tensor with three dimensions has 170 bytes."""
ZIP_MAGIC = b"PK\x03\x04"
ZIP_ENTRY_MAGIC = b"PK\x01\x02"
STORAGES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch HalfStorage": torch.float16,
    "torch FloatStorage": torch.float32,
}
EMBEDDING_DTYPES = tuple(STORAGES.values())
LOCATION = re.compile(r"cpu|cuda:\d+", re.ASCII)
"""Where the sender had the tensor; other services may save it from their GPU."""
INTEGER_OPCODES = {"BININT", "BININT1", "BININT2", "LONG1"}
MEMO_OPCODES = {"BINPUT", "LONG_BINPUT"}
"""They only number the objects; nothing in a plain tensor's pickle refers to the numbers."""
Opcode = tuple[str, Any]


class WireError(ValueError):
    """The bytes are not the expected tensor. The message names the failed check, never the content."""


def dump_torch(tensor: torch.Tensor) -> bytes:
    """Serialize the tensor with ``torch.save``; at most its own bytes + 4 KiB, even for a view of a larger one."""
    buffer = io.BytesIO()
    torch.save(compact(tensor.detach().cpu()), buffer)
    return buffer.getvalue()


def dump_safetensors(tensor: torch.Tensor) -> bytes:
    """Serialize the tensor with safetensors, under ``TENSOR_NAME``."""
    return save_safetensors({TENSOR_NAME: compact(tensor.detach().cpu())})


def parse_torch(data: bytes, shape: Sequence[int | None]) -> torch.Tensor:
    """Deserialize a tensor that was saved by ``torch.save``.

    Args:
        data: untrusted bytes.
        shape: the expected shape; ``None`` for a dimension of any size.

    Raises:
        WireError: the data is not exactly one plain, finite, contiguous tensor of that shape and of a dtype in
            ``EMBEDDING_DTYPES``.
    """
    _check_size(data, shape)
    try:
        return _checked(_read_archive(data), shape)
    except WireError:
        raise
    except Exception as error:
        raise WireError("not a tensor saved by torch.save") from error


def parse_safetensors(data: bytes, shape: Sequence[int | None]) -> torch.Tensor:
    """Like ``parse_torch``, for a safetensors file with one tensor of any name."""
    _check_size(data, shape)
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise WireError("a safetensors header that is too large")
    try:
        tensors = load_safetensors(data)
        if len(tensors) != 1:
            raise WireError(f"expected one tensor, found {len(tensors)}")
        return _checked(next(iter(tensors.values())), shape)
    except WireError:
        raise
    except Exception as error:
        raise WireError("not a safetensors file") from error


def _check_size(data: bytes, shape: Sequence[int | None]) -> None:
    """Reject data that is too large for the largest dtype, if all dimensions of the shape are known."""
    largest = max(dtype.itemsize for dtype in EMBEDDING_DTYPES)
    for size in shape:
        if size is None:
            return
        largest *= size
    if len(data) > largest + MAX_HEADER_BYTES:
        raise WireError(f"{len(data)} bytes are more than a tensor of this shape can have")


def _read_archive(data: bytes) -> torch.Tensor:
    """Read the tensor of an archive without unpickling; every member that is used has a correct checksum."""
    if not data.startswith(ZIP_MAGIC) or data.count(ZIP_ENTRY_MAGIC) > MAX_MEMBERS:  # before all entries are parsed
        raise WireError("not a torch.save archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        folder, members = _members(archive)
        if any(members.get(name, 0) > MAX_PICKLE_BYTES for name in ("data.pkl", "byteorder")):
            raise WireError("an archive with oversized members")
        if "byteorder" in members and archive.read(folder + "byteorder") != b"little":
            raise WireError("expected little-endian values")
        dtype, key, size = _parse_pickle(archive.read(folder + "data.pkl"))
        names = [name for name in members if name.startswith("data/")]
        if names != [f"data/{key}"] or members[names[0]] != math.prod(size) * dtype.itemsize:
            raise WireError("expected values of exactly the tensor's size")
        values = bytearray(archive.read(folder + names[0]))  # which checks the CRC
    if not values:
        raise WireError("expected at least one value")
    return torch.frombuffer(values, dtype=dtype).view(size)


def _members(archive: zipfile.ZipFile) -> tuple[str, dict[str, int]]:
    """Return the archive's single folder, and the sizes in bytes of the members in it, by name."""
    members = archive.infolist()
    folder = members[0].filename.partition("/")[0] + "/"
    sizes = {member.filename.removeprefix(folder): member.file_size for member in members}
    if len(members) > MAX_MEMBERS or len(sizes) != len(members):
        raise WireError("an archive with too many or repeated members")
    if any(member.compress_type != zipfile.ZIP_STORED or not member.filename.startswith(folder) for member in members):
        raise WireError("an archive with compressed members or several folders")
    if any(member.file_size != member.compress_size for member in members):
        raise WireError("an archive with contradicting sizes")
    return folder, sizes


def _parse_pickle(data: bytes) -> tuple[torch.dtype, str, tuple[int, ...]]:
    """Return the dtype, the storage's key and the shape from the pickle of a plain, contiguous tensor."""
    opcodes = list(_opcodes(data))
    integers = [value for name, value in opcodes if name == "integer"]
    texts = [value for name, value in opcodes if name == "BINUNICODE"]
    storages = [value for name, value in opcodes if name == "GLOBAL" and value in STORAGES]
    rank = len(integers) // 2 - 1
    size, strides = tuple(integers[2 : 2 + rank]), integers[2 + rank :]
    if len(texts) != 3 or len(storages) != 1 or rank < 1 or not LOCATION.fullmatch(texts[2]):
        raise WireError("not the pickle of a plain tensor")
    # The stride of a dimension of size 1 means nothing, so that any is contiguous.
    contiguous = [
        stride if length == 1 else math.prod(size[axis + 1 :])
        for axis, (length, stride) in enumerate(zip(size, strides, strict=True))
    ]
    if opcodes != _plain_tensor(storages[0], texts[1], texts[2], size, contiguous):
        raise WireError("not the pickle of a plain, contiguous tensor")
    return STORAGES[storages[0]], texts[1], size


def _opcodes(data: bytes) -> Iterator[Opcode]:
    """Yield the opcodes of a pickle with their arguments, without the memo's; integers have one name."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in MEMO_OPCODES:
            yield "integer" if opcode.name in INTEGER_OPCODES else opcode.name, argument


def _plain_tensor(storage: str, key: str, location: str, size: Sequence[int], strides: Sequence[int]) -> list[Opcode]:
    """Return what ``torch.save`` writes for a tensor that fills its storage; see ``torch._tensor.Tensor``."""
    return [
        ("PROTO", 2),
        ("GLOBAL", "torch._utils _rebuild_tensor_v2"),
        ("MARK", None),
        *[("MARK", None), ("BINUNICODE", "storage"), ("GLOBAL", storage), ("BINUNICODE", key)],
        *[("BINUNICODE", location), ("integer", math.prod(size)), ("TUPLE", None), ("BINPERSID", None)],
        ("integer", 0),  # the offset in the storage
        *_tuple(size),
        *_tuple(strides),
        ("NEWFALSE", None),  # requires_grad
        *[("GLOBAL", "collections OrderedDict"), ("EMPTY_TUPLE", None), ("REDUCE", None)],  # hooks
        *[("TUPLE", None), ("REDUCE", None), ("STOP", None)],
    ]


def _tuple(integers: Sequence[int]) -> list[Opcode]:
    """Return the opcodes of a tuple of integers."""
    items = [("integer", value) for value in integers]
    return [*items, (f"TUPLE{len(items)}", None)] if len(items) <= 3 else [("MARK", None), *items, ("TUPLE", None)]


def _checked(tensor: torch.Tensor, shape: Sequence[int | None]) -> torch.Tensor:
    if tensor.dtype not in EMBEDDING_DTYPES:
        raise WireError(f"expected a floating tensor, found {tensor.dtype}")
    if len(tensor.shape) != len(shape) or any(
        want not in (None, have) for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise WireError(f"expected shape {_format(shape)}, found {_format(tensor.shape)}")
    if tensor.numel() == 0 or not is_finite(tensor):
        raise WireError("expected finite values")
    return tensor


def _format(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
