"""The memory that a model needs, from its files, compared with that of a host."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from demo_model.services import WEIGHTS
from flux2_shared.model.subfolders import SUBFOLDERS, Service
from flux2_shared.settings import FLUX2_DEV
from generator_service.doctor.check import Check, Status
from generator_service.doctor.gpus import Placement
from generator_service.doctor.host import Memory
from generator_service.doctor.libraries import Gpu
from generator_service.doctor.memory import (
    FLUX2_DEV_SIZES,
    Need,
    Sizes,
    check_gpu_memory,
    check_host_memory,
    encoder_need,
    generator_need,
    sizes_of,
)
from generator_service.doctor.model import Model, inspect
from tests.generator_service.doctor.hosts import GB, gpu

TOKENS = 8 * 512
BOTH = (Service.GENERATOR, Service.TEXT_ENCODER)


def read_sizes(folder: Path) -> Sizes:
    """The sizes in the headers of a folder's files."""
    model, problems = inspect(Model("m", "local", folder), (*SUBFOLDERS[BOTH[0]], *SUBFOLDERS[BOTH[1]]))
    assert problems == {}
    sizes = sizes_of(model)
    assert sizes is not None
    return sizes


def test_the_known_sizes_are_those_of_the_files(flux2_dev: Path) -> None:
    """The constants for FLUX.2 [dev] equal the sizes counted from its files: 64.4, 0.2 and 34.7 GB in bfloat16."""
    counted = read_sizes(flux2_dev)
    assert sorted(counted.blocks) == sorted(FLUX2_DEV_SIZES.blocks)
    for name in ("outside_blocks", "vae", "encoder_linear", "encoder_rest", "per_token"):
        assert getattr(counted, name) == getattr(FLUX2_DEV_SIZES, name), name
    assert 2 * (sum(counted.blocks) + counted.outside_blocks) == pytest.approx(64.4 * GB, rel=1e-3)
    assert 2 * (counted.encoder_linear + counted.encoder_rest) == pytest.approx(34.7 * GB, rel=1e-3)
    assert counted.file_bytes is not None
    assert FLUX2_DEV_SIZES.file_bytes is not None
    for service in BOTH:
        assert counted.file_bytes[service] == pytest.approx(FLUX2_DEV_SIZES.file_bytes[service], rel=0.02)


def test_sizes_of_flux2_dev_are_known_without_its_files() -> None:
    """Sizes of an absent model are known only for FLUX.2 [dev]."""
    assert sizes_of(Model(FLUX2_DEV, "main")) == FLUX2_DEV_SIZES
    assert sizes_of(Model("someone/other", "main")) is None


def test_the_demo_model_is_counted() -> None:
    """The demo model's text encoder counts with three of its four layers."""
    sizes = read_sizes(WEIGHTS)
    assert len(sizes.blocks) == 6
    assert 0 < sizes.encoder_linear + sizes.encoder_rest < 1_352_792 / 2
    assert generator_need(sizes, None, "float32", is_offloaded=False).host < 1.2 * GB


@pytest.mark.parametrize(
    ("total", "is_offloaded", "fits"), [(85, False, True), (51, False, False), (25, True, True), (8, True, False)]
)
def test_gpus_for_the_generator(total: int, is_offloaded: bool, fits: bool) -> None:
    """80 GB hold the generator, 48 GB do not, and 24 GB do with blocks offloaded to host memory."""
    small = gpu(total_bytes=total * GB, free_bytes=total * GB)
    need = generator_need(FLUX2_DEV_SIZES, small, "bfloat16", is_offloaded=is_offloaded)
    [check] = check_on([need], {Service.GENERATOR: small})
    assert (check.status is Status.OK) == fits
    assert (need.host > 69 * GB) == is_offloaded


@pytest.mark.parametrize(
    ("total", "weights", "fits"),
    [(42, "full", True), (34, "full", False), (25, "int8", True), (17, "int8", False), (17, "int4", True)],
)
def test_gpus_for_the_text_encoder(total: int, weights: str, fits: bool) -> None:
    """40 GB hold the text encoder, 24 GB with int8 weights, 16 GB with int4 weights."""
    small = gpu(total_bytes=total * GB, free_bytes=total * GB)
    need = encoder_need(FLUX2_DEV_SIZES, small, "bfloat16", weights, TOKENS)
    [check] = check_on([need], {Service.TEXT_ENCODER: small})
    assert (check.status is Status.OK) == fits
    assert need.host == pytest.approx(35.7 * GB, rel=1e-2)


def needs(on: Gpu, other: Gpu | None = None) -> list[Need]:
    """The memory that both services need for FLUX.2 [dev]."""
    return [
        encoder_need(FLUX2_DEV_SIZES, other or on, "bfloat16", "full", TOKENS),
        generator_need(FLUX2_DEV_SIZES, on, "bfloat16", is_offloaded=False),
    ]


def check_on(
    wanted: Sequence[Need], on: dict[Service, Gpu], gpus: tuple[Gpu, ...] = (), running: Sequence[Service] = ()
) -> list[Check]:
    """The checks of the GPUs' memory."""
    placements = {service: Placement(service, where) for service, where in on.items()}
    return list(check_gpu_memory(wanted, placements, gpus or tuple(dict.fromkeys(on.values())), running))


def test_two_services_on_one_gpu_are_added() -> None:
    """Both services on one GPU exceed 80 GB and fit into 140 GB."""
    small, large = gpu(), gpu(total_bytes=141 * GB, free_bytes=140 * GB)
    [failed] = check_on(needs(small), dict.fromkeys(BOTH, small))
    assert failed.status is Status.FAILED
    assert "text-encoder" in failed.detail
    assert "generator" in failed.detail
    assert "GPU of its own" not in failed.fix
    [passed] = check_on(needs(large), dict.fromkeys(BOTH, large))
    assert passed.status is Status.OK


def test_two_gpus_are_suggested_if_available() -> None:
    """With two GPUs the fix is a GPU for each service, if both fit."""
    first, second = gpu(0), gpu(1)
    [failed] = check_on(needs(first), dict.fromkeys(BOTH, first), (first, second))
    assert "TEXT_ENCODER_DEVICE=cuda:0 and GENERATOR_DEVICE=cuda:1" in failed.fix
    on = {Service.TEXT_ENCODER: first, Service.GENERATOR: second}
    checks = check_on(needs(second, first), on, (first, second))
    assert [(each.name, each.status) for each in checks] == [
        ("memory of gpu 0", Status.OK),
        ("memory of gpu 1", Status.OK),
    ]


@pytest.mark.parametrize(
    ("total", "suggested"),
    [
        (96, "TEXT_ENCODER_WEIGHTS=int8 (21 GB);"),
        (51, "GENERATOR_PERFORMANCE=offload (12 GB, slower);"),
        (34, "TEXT_ENCODER_WEIGHTS=int8 (21 GB) and GENERATOR_PERFORMANCE=offload (12 GB, slower);"),
        (10, None),
    ],
)
def test_the_smallest_change_that_fits_is_suggested(total: int, suggested: str | None) -> None:
    """The suggested fix is the smallest change of settings that fits, if there is one."""
    small = gpu(total_bytes=total * GB, free_bytes=total * GB)
    [failed] = check_on(needs(small), dict.fromkeys(BOTH, small))
    assert failed.status is Status.FAILED
    assert failed.fix.endswith("a GPU of at least 109 GB")
    if suggested is None:
        assert "=" not in failed.fix
    else:
        assert failed.fix.startswith(suggested)


def test_memory_in_use_is_subtracted() -> None:
    """Memory in use by other processes is a failure, unless it is the service itself."""
    busy = gpu(free_bytes=10 * GB)
    need = generator_need(FLUX2_DEV_SIZES, busy, "bfloat16", is_offloaded=False)
    [failed] = check_on([need], {Service.GENERATOR: busy})
    assert failed.status is Status.FAILED
    assert "10.0 GB are free" in failed.detail
    [running] = check_on([need], {Service.GENERATOR: busy}, running=[Service.GENERATOR])
    assert running.status is Status.OK
    [other] = check_on([need], {Service.GENERATOR: busy}, running=[Service.TEXT_ENCODER])
    assert other.status is Status.FAILED


def test_without_a_gpu_gpu_memory_is_skipped() -> None:
    """GPU memory is skipped if no service uses a GPU."""
    placements = {Service.GENERATOR: Placement(Service.GENERATOR, None)}
    [skipped] = check_gpu_memory([Need(Service.GENERATOR, 0, 1, "x")], placements, (), ())
    assert skipped.status is Status.SKIPPED


@pytest.mark.parametrize(
    ("total", "available", "status"),
    [(64, 60, Status.OK), (64, 20, Status.WARNING), (32, 30, Status.FAILED)],
)
def test_host_memory(total: int, available: int, status: Status) -> None:
    """Too little host memory is a failure; too little free memory is a warning."""
    need = encoder_need(FLUX2_DEV_SIZES, gpu(), "bfloat16", "full", TOKENS)
    [check] = check_host_memory([need], Memory(total * GB, available * GB), ())
    assert check.status is status
    [running] = check_host_memory([need], Memory(total * GB, available * GB), [Service.TEXT_ENCODER])
    assert running.status is Status.SKIPPED


def test_unknown_host_memory_is_skipped() -> None:
    """Host memory is skipped if it cannot be read."""
    [check] = check_host_memory([Need(Service.GENERATOR, 0, 1, "x")], None, ())
    assert check.status is Status.SKIPPED
