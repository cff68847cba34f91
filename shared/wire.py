"""Serialization of tensors. The only module that deserializes them; all input is untrusted.

``torch.load(weights_only=True)`` runs no code, but was observed to load bit-flipped data silently, to inflate 66 KB to
67 MB, and to accept shapes far larger than their storage. The checks here go from the cheapest to the most expensive:
size, container, members and checksums, then the restricted unpickler, then the tensor itself.
"""

import io
import zipfile
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
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
ZIP_MAGIC = b"PK\x03\x04"
EMBEDDING_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    archive = _rebuilt_archive(data)
    try:
        loaded = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WireError("not a tensor saved by torch.save") from error
    return _checked(loaded, shape)


def parse_safetensors(data: bytes, shape: Sequence[int | None]) -> torch.Tensor:
    """Like ``parse_torch``, for a safetensors file with one tensor of any name."""
    _check_size(data, shape)
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise WireError("not a safetensors file") from error
    if len(tensors) != 1:
        raise WireError(f"expected one tensor, found {len(tensors)}")
    return _checked(next(iter(tensors.values())), shape)


def _check_size(data: bytes, shape: Sequence[int | None]) -> None:
    """Reject data that is too large for the largest dtype, if all dimensions of the shape are known."""
    largest = max(dtype.itemsize for dtype in EMBEDDING_DTYPES)
    for size in shape:
        if size is None:
            return
        largest *= size
    if len(data) > largest + MAX_HEADER_BYTES:
        raise WireError(f"{len(data)} bytes are more than a tensor of this shape can have")


def _rebuilt_archive(data: bytes) -> io.BytesIO:
    """Check the archive's members and their checksums, and write a new archive from them.

    torch and Python read a damaged archive differently: torch was observed to read data from another location than the
    one whose checksum was correct. It therefore gets only data that was read and verified here.
    """
    if not data.startswith(ZIP_MAGIC):
        raise WireError("not a torch.save archive")
    rebuilt = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(rebuilt, "w") as copy:
            members = archive.infolist()
            if not 0 < len(members) <= MAX_MEMBERS or len({m.filename for m in members}) != len(members):
                raise WireError("an archive with too many or repeated members")
            if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > len(data) for m in members):
                raise WireError("an archive with compressed or oversized members")
            for member in members:
                copy.writestr(member.filename, archive.read(member))  # read checks the CRC
    except WireError:
        raise
    except Exception as error:
        raise WireError("not a readable archive") from error
    rebuilt.seek(0)
    return rebuilt


def _checked(loaded: object, shape: Sequence[int | None]) -> torch.Tensor:
    if type(loaded) is not torch.Tensor:
        raise WireError(f"expected a tensor, found {type(loaded).__name__}")
    tensor = loaded
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.requires_grad:
        raise WireError("expected a plain dense tensor")
    if tensor.dtype not in EMBEDDING_DTYPES:
        raise WireError(f"expected a floating tensor, found {tensor.dtype}")
    if len(tensor.shape) != len(shape) or any(
        want not in (None, have) for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise WireError(f"expected shape {_format(shape)}, found {_format(tensor.shape)}")
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
        raise WireError("expected a contiguous tensor that fills its storage")
    if tensor.numel() == 0 or not is_finite(tensor):
        raise WireError("expected finite values")
    return tensor


def _format(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
