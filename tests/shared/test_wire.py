"""The guarded loader: no payload runs code, raises another error, or is misread."""

import io
import os
import pickle
import random
import struct
import tracemalloc
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


def in_archive(pickled: bytes, values: bytes = b"", byteorder: bytes = b"little") -> bytes:
    """An archive with the members that torch writes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", values)
        archive.writestr("archive/version", b"3\n")
    return target.getvalue()


def pickle_of(thing: object) -> bytes:
    """The pickle in the output of ``torch.save``."""
    return zipfile.ZipFile(io.BytesIO(saved(thing))).read("archive/data.pkl")


VALUES = embedding().view(torch.uint8).numpy().tobytes()
PLAIN = pickle_of(embedding())


def replaced(old: bytes, new: bytes) -> Callable[[], bytes]:
    """The embedding's archive with a part of its pickle replaced."""
    assert PLAIN.count(old) == 1
    return lambda: in_archive(PLAIN.replace(old, new), VALUES)


def calling(name: bytes, argument: bytes) -> bytes:
    """A pickle that calls a function of torch's allow-list."""
    return b"\x80\x02c" + name + b"\n" + argument + b"\x85R."


def many_entries() -> bytes:
    """A zip directory with as many empty entries as the size allows."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for index in range(60):
            archive.writestr(str(index), b"")
    return target.getvalue()


class Subclass(torch.Tensor):
    """A tensor class of another program."""


HOSTILE |= {
    "function that allocates 2 GB": lambda: in_archive(calling(b"__builtin__\nbytearray", b"J\xff\xff\xff\x7f")),
    "uninitialized memory": lambda: in_archive(calling(b"torch\nTensor", b"K\x01K\x04K\x06\x87")),
    "nested": lambda: saved(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "parameter that needs gradients": lambda: saved(torch.nn.Parameter(torch.ones(SHAPE), requires_grad=True)),
    "subclass": lambda: saved(embedding().as_subclass(Subclass)),
    "conjugated view": lambda: saved(torch.ones(SHAPE, dtype=torch.complex64).conj()),
    "meta tensor": lambda: saved(torch.empty(SHAPE, device="meta")),
    "many lists": lambda: in_archive(b"\x80\x02" + b"]" * 500 + b".", VALUES),
    "long pickle": lambda: in_archive(b"\x80\x02" + b"]" * 3000 + b".", VALUES[:8]),
    "no pickle": lambda: in_archive(b"", VALUES),
    "other text": lambda: in_archive(b"S'x'\n.", VALUES),
    "decimal numbers": replaced(b"K\x18t", b"I24\nt"),
    "requires gradients": replaced(b"\x89c", b"\x88c"),
    "offset": replaced(b"QK\x00", b"QK\x01"),
    "other strides": replaced(b"K\x18K\x06K\x01\x87", b"K\x18K\x01K\x04\x87"),
    "negative shape": replaced(b"K\x01K\x04K\x06\x87", b"K\x01J\xfc\xff\xff\xffJ\xfa\xff\xff\xff\x87"),
    "larger storage": replaced(b"K\x18t", b"K\x19t"),
    "other location": replaced(b"X\x03\x00\x00\x00cpu", b"X\x04\x00\x00\x00meta"),
    "other key": replaced(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"),
    "key that leaves the folder": replaced(b"X\x01\x00\x00\x000", b"X\x07\x00\x00\x00../../0"),
    "other storage": replaced(b"BFloat16Storage", b"Float8_e5m2Storage"),
    "storage of another width": replaced(b"BFloat16Storage", b"FloatStorage"),
    "another protocol": replaced(b"\x80\x02c", b"\x80\x04c"),
    "more after the end": lambda: in_archive(PLAIN[:-1] + b"0" + PLAIN, VALUES),
    "hooks": replaced(b")R", b"](K\x00K\x00\x86e\x85R"),
    "fewer values": lambda: in_archive(PLAIN, VALUES[:-2]),
    "more values": lambda: in_archive(PLAIN, VALUES + bytes(2)),
    "big-endian": lambda: in_archive(PLAIN, VALUES, b"big"),
    "long byte order": lambda: in_archive(PLAIN, VALUES, b"little" * 100),
    "two folders": lambda: saved(embedding()).replace(b"archive/version", b"another/version"),
    "many directory entries": many_entries,
    "second storage": lambda: rezipped(saved(embedding())).replace(b"archive/version", b"archive/data/11"),
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


LARGE = (1, 512, 15360)
LARGE_BYTES = 512 * 15360 * 4
EXPENSIVE: dict[str, Callable[[], bytes]] = {
    "lists": lambda: in_archive(b"\x80\x02" + b"]" * (LARGE_BYTES - 1000) + b"."),
    "directory": lambda: many_entries_of(LARGE_BYTES),
    "allocation": HOSTILE["function that allocates 2 GB"],
    "uninitialized": HOSTILE["uninitialized memory"],
    "nested": HOSTILE["nested"],
}


def many_entries_of(size: int) -> bytes:
    """An archive whose directory has as many entries as ``size`` bytes can hold."""
    entry = zipfile.ZipInfo("a")
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(entry, b"")
    data = target.getvalue()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    directory = data[start:end] * (size // (end - start))
    tail = bytearray(data[end:])
    tail[12:16] = struct.pack("<I", len(directory))
    return data[:start] + directory + bytes(tail)


@pytest.mark.parametrize("kind", EXPENSIVE)
@pytest.mark.filterwarnings("ignore")
def test_malicious_payloads_cost_nothing(kind: str) -> None:
    """They are refused before anything is built: less than a megabyte is allocated."""
    data = EXPENSIVE[kind]()
    tracemalloc.start()
    with pytest.raises(WireError):
        parse_torch(data, LARGE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_long_header_of_safetensors_costs_nothing() -> None:
    """A header of more than 4 KiB is refused before it is parsed: it could name a million tensors."""
    header = (
        b"{" + b",".join(b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % k for k in range(50_000)) + b"}"
    )
    data = struct.pack("<Q", len(header)) + header
    with pytest.raises(WireError, match="header"):
        parse_safetensors(data, LARGE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tensors_of_any_rank_are_read(dtype: torch.dtype, rank: int) -> None:
    """What ``torch.save`` writes for a plain tensor is read, whatever its rank."""
    tensor = torch.randn((2, 3, 1, 300, 2)[:rank]).to(dtype)
    assert torch.equal(parse_torch(saved(tensor), tensor.shape), tensor)


def test_archives_of_other_versions_are_read() -> None:
    """Archives of older torch have no byte order and other names; services with a GPU may save from it."""
    plain = saved(embedding())
    older = rezipped(plain, drop="byteorder").replace(b"archive/", b"prompt_/")
    on_gpu = in_archive(PLAIN.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1"), VALUES)
    for data in (older, on_gpu, rezipped(plain, drop="/.")):
        assert torch.equal(parse_torch(data, SHAPE), embedding())


def test_the_stride_of_a_single_row_is_ignored() -> None:
    """A tensor is contiguous whatever the stride of a dimension of size 1, as ``torch`` has it."""
    tensor = embedding().reshape(4, 1, 6).transpose(0, 1)
    assert tensor.is_contiguous()
    assert tensor.stride(0) != 24
    assert torch.equal(parse_torch(saved(tensor), SHAPE), tensor)


def test_the_parsed_tensor_can_be_changed() -> None:
    """It owns its memory."""
    parsed = parse_torch(dump_torch(embedding()), SHAPE)
    parsed += 1
    assert not torch.equal(parsed, embedding())


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
