"""The guarded loader: no payload runs code, raises another error, or is misread."""

import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save as save_safetensors

from flux2_shared.wire import (
    MAX_HEADER_BYTES,
    WireError,
    dump_safetensors,
    dump_torch,
    parse_safetensors,
    parse_torch,
)

SHAPE = (1, 4, 6)
NUM_MUTATIONS = 20_000


def embedding(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A small embedding."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def saved(thing: object) -> bytes:
    """The output of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


class RunsCode:
    """Executes a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        """The unpickler's hook."""
        return os.system, ("touch pwned",)


def rezipped(data: bytes, compression: int = zipfile.ZIP_STORED, extra: int = 0, drop: str = "") -> bytes:
    """The same archive packed again, with more or fewer members."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for member in source.infolist():
            if not drop or drop not in member.filename:
                archive.writestr(member.filename, source.read(member))
        for index in range(extra):
            archive.writestr(f"archive/extra{index}", b"x")
    return target.getvalue()


def bit_flipped(data: bytes) -> bytes:
    """Flip one bit of the tensor's values."""
    values = embedding().view(torch.uint8).numpy().tobytes()
    at = data.index(values) + 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def huge_shape() -> bytes:
    """A tensor with a shape of far more elements than it stores."""
    return saved(torch.zeros(1).expand(1, 100_000, 100_000))


def with_code() -> bytes:
    """A pickle that runs a command, in a valid archive."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(RunsCode()))
        archive.writestr("archive/version", b"3\n")
    return target.getvalue()


def sparse_out_of_range() -> bytes:
    """A sparse tensor with indices out of range."""
    tensor = torch.sparse_coo_tensor(torch.tensor([[9], [9], [9]]), torch.ones(1), (10, 10, 10), check_invariants=False)
    return saved(tensor)


def with_nan() -> bytes:
    """An embedding with one NaN."""
    tensor = embedding()
    tensor[0, 1, 2] = float("nan")
    return saved(tensor)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"<html>Bad Gateway</html>",
    "pickle that runs code": lambda: pickle.dumps(RunsCode()),
    "archive that runs code": with_code,
    "module": lambda: saved(torch.nn.Linear(2, 2)),
    "legacy format": lambda: saved_legacy(embedding()),
    "dict": lambda: saved({"prompt_embeds": embedding()}),
    "ordered dict": lambda: saved(OrderedDict(a=embedding())),
    "string": lambda: saved("prompt"),
    "list of tensors": lambda: saved([embedding()]),
    "parameter": lambda: saved(torch.nn.Parameter(embedding().float())),
    "integers": lambda: saved(torch.ones(SHAPE, dtype=torch.int64)),
    "other shape": lambda: saved(torch.zeros(1, 4, 7, dtype=torch.bfloat16)),
    "other rank": lambda: saved(torch.zeros(4, 6, dtype=torch.bfloat16)),
    "huge shape on one value": huge_shape,
    "view of a larger storage": lambda: saved(torch.zeros(5, 4, 6, dtype=torch.bfloat16)[1:2]),
    "transposed": lambda: saved(torch.zeros(1, 6, 4, dtype=torch.bfloat16).transpose(1, 2)),
    "sparse": lambda: saved(embedding().float().to_sparse()),
    "sparse out of range": sparse_out_of_range,
    "quantized": lambda: saved(torch.quantize_per_tensor(embedding().float(), 0.1, 0, torch.qint8)),
    "not a number": with_nan,
    "bit flipped": lambda: bit_flipped(saved(embedding())),
    "compressed": lambda: rezipped(saved(embedding()), zipfile.ZIP_DEFLATED),
    "many members": lambda: rezipped(saved(embedding()), extra=20),
    "no data": lambda: rezipped(saved(embedding()), drop="data/0"),
    "truncated": lambda: saved(embedding())[:-40],
    "too large": lambda: saved(embedding()) + bytes(2 * MAX_HEADER_BYTES),
    "zip bomb": lambda: rezipped(saved(torch.zeros(1, 4000, 6, dtype=torch.bfloat16)), zipfile.ZIP_DEFLATED),
}


def saved_legacy(thing: object) -> bytes:
    """The format of torch before archives: a bare pickle."""
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HOSTILE)
def test_malicious_payloads_are_refused(kind: str) -> None:
    """Every malicious payload is a ``WireError``, and none of its code runs."""
    with pytest.raises(WireError):
        parse_torch(HOSTILE[kind](), SHAPE)
    assert not os.path.exists("pwned")  # noqa: PTH110 - the simplest check


def test_the_code_of_malicious_payloads_would_run_without_the_guard() -> None:
    """Without the guard the code in the payloads leaves a file, so its absence shows that the code did not run."""
    assert pickle.loads(pickle.dumps(RunsCode())) == 0
    assert os.path.exists("pwned")  # noqa: PTH110 - as above


def test_corrupted_payloads_are_refused_or_harmless() -> None:
    """Each of 20,000 corrupted payloads is refused with ``WireError``, or is the tensor that was sent."""
    rng = random.Random(0)
    tensor = embedding()
    data = dump_torch(tensor)
    refused = 0
    for _ in range(NUM_MUTATIONS):
        mutated = mutate(data, rng)
        try:
            loaded = parse_torch(mutated, SHAPE)
        except WireError:
            refused += 1
        else:
            assert torch.equal(loaded, tensor)
            assert loaded.dtype == tensor.dtype
    assert refused > NUM_MUTATIONS / 2


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Corrupt ``data`` once or a few times: flip, overwrite, cut, insert, repeat."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4))):
        at = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 4] = struct.pack("<I", rng.getrandbits(32))
            case 2:
                del changed[at : at + rng.randrange(1, 20)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 20))
            case _:
                changed[at:at] = changed[at : at + rng.randrange(1, 20)]
    return bytes(changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_survive_the_wire(dtype: torch.dtype) -> None:
    """Both formats preserve the tensor bit for bit."""
    tensor = embedding(dtype)
    assert torch.equal(parse_torch(dump_torch(tensor), SHAPE), tensor)
    assert torch.equal(parse_safetensors(dump_safetensors(tensor), SHAPE), tensor)


def test_a_view_is_saved_without_its_storage() -> None:
    """A row of a batch is saved without the batch: the file is at most the tensor plus 4 KiB."""
    row = torch.zeros(64, 512, 16, dtype=torch.bfloat16)[3:4]
    assert len(dump_torch(row)) <= row.nbytes + MAX_HEADER_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bodies_equal_those_of_the_libraries(dtype: torch.dtype) -> None:
    """A tensor and a view of it give the bytes that the libraries write for a plain copy."""
    batch = torch.stack([embedding(dtype)[0], embedding(dtype)[0] + 1])
    for tensor in (embedding(dtype), batch[1:], batch.transpose(1, 2)):
        copy = tensor.clone(memory_format=torch.contiguous_format)
        assert dump_torch(tensor) == saved(copy)
        assert dump_safetensors(tensor) == save_safetensors({"prompt_embeds": copy})


def test_dimensions_may_be_unspecified() -> None:
    """A dimension of None in the expected shape accepts any size."""
    assert parse_torch(dump_torch(embedding()), (1, None, 6)).shape == SHAPE


@pytest.mark.parametrize(
    "body", [b"", b"x" * 40, b"\xff" * 8 + b"{}", struct.pack("<Q", 2**40) + b"{}", dump_torch(embedding())]
)
def test_bad_safetensors_are_refused(body: bytes) -> None:
    """A malformed safetensors body is a ``WireError``."""
    with pytest.raises(WireError):
        parse_safetensors(body, SHAPE)
