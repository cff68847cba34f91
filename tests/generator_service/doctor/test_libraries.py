"""The probe of the libraries in its own process, which may crash, hang or print other output."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from flux2_shared.model.subfolders import Service
from generator_service.doctor import libraries as module
from generator_service.doctor.check import Status
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import (
    Attention,
    Libraries,
    check_libraries,
    check_packages,
    check_python,
    read_libraries,
)
from generator_service.doctor.probe import Facts, choose_attention
from tests.generator_service.doctor.hosts import (
    H100_BYTES,
    STUBS,
    by_name,
    described,
    gpu,
    install_packages,
    libraries,
    torch_with,
)

BOTH = (Service.GENERATOR, Service.TEXT_ENCODER)


def host_with(tmp_path: Path, **sources: str) -> Host:
    """A host whose Python imports these packages."""
    packages = install_packages(tmp_path / "packages", **(STUBS | sources))
    return described(tmp_path, PYTHONPATH=packages)


def test_gpus_are_read_from_torch(tmp_path: Path) -> None:
    """The probe reports versions, CUDA and each GPU with its free memory."""
    facts = read_libraries(host_with(tmp_path, torch=torch_with(gpu(0), gpu(1, free_bytes=5))))
    assert facts.versions == {"torch": "2.13.0", "transformers": "5.23.0", "diffusers": "0.42.1"}
    assert (facts.cuda, facts.architectures, facts.errors) == ("13.0", ("sm_80", "sm_90"), {})
    assert [(each.capability, each.total_bytes, each.free_bytes) for each in facts.gpus] == [
        ((9, 0), H100_BYTES, gpu().free_bytes),
        ((9, 0), H100_BYTES, 5),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.kill(os.getpid(), 11)", "importing it ended the process by signal 11"),
        ("import sys; sys.exit('bye')", "importing it ended the process with status 1: bye"),
        ("this does not parse", "SyntaxError"),
        ("", "AttributeError: module 'torch' has no attribute '__version__'"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_a_failure(tmp_path: Path, source: str, message: str) -> None:
    """A torch that raises, crashes or exits at import is a failure, and its dependents are skipped."""
    facts = read_libraries(host_with(tmp_path, torch=source))
    assert not facts.has_torch
    checks = by_name(list(check_libraries(facts, BOTH)))
    assert checks["torch"].status is Status.FAILED
    assert message in checks["torch"].detail
    assert "pip install" in checks["torch"].fix
    assert checks["diffusers"].status is checks["transformers"].status is Status.SKIPPED


def test_a_torch_that_hangs_is_stopped(tmp_path: Path) -> None:
    """An import that hangs is stopped after the timeout."""
    host = host_with(tmp_path, torch="import time; time.sleep(600)")
    facts = read_libraries(Host(host.environ, host.root, import_timeout_s=3))
    assert facts.errors.keys() == {"torch"}
    assert "took longer than 3 s" in facts.errors["torch"]


@pytest.mark.parametrize("name", ["transformers", "diffusers"])
def test_a_broken_library_is_reported(tmp_path: Path, name: str) -> None:
    """Only the check of the broken library fails."""
    source = "__version__ = '1'\ndef __getattr__(name): raise ImportError(f'cannot import {name}')"
    facts = read_libraries(host_with(tmp_path, torch=torch_with(), **{name: source}))
    checks = by_name(list(check_libraries(facts, BOTH)))
    assert {each for each, check in checks.items() if check.status is Status.FAILED} == {name}
    assert "ImportError: cannot import Auto" in checks[name].detail
    if name == "diffusers":
        assert all(check.status is Status.OK for check in check_libraries(facts, (Service.TEXT_ENCODER,)))


def test_the_error_of_a_gpu_is_reported_with_it(tmp_path: Path) -> None:
    """An error on one GPU is stored with that GPU, and the others are reported."""
    source = (
        torch_with(gpu(0), gpu(1))
        + """
        def broken(index):
            if index == 1:
                raise RuntimeError("CUDA error: all CUDA-capable devices are busy")
            return 7, 8

        cuda.mem_get_info = broken
        """
    )
    first, second = read_libraries(host_with(tmp_path, torch=source)).gpus
    assert (first.error, first.free_bytes) == ("", 7)
    assert (second.error, second.free_bytes) == ("RuntimeError: CUDA error: all CUDA-capable devices are busy", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("def init(): raise RuntimeError('driver too old')\ncuda.init = init", "RuntimeError: driver too old"),
        (
            "import os\ncuda.is_available = lambda: os.kill(os.getpid(), 6)",
            "listing them ended the process by",
        ),
    ],
)
def test_the_reason_why_torch_sees_no_gpu(tmp_path: Path, change: str, message: str) -> None:
    """The reason why torch sees no GPU is kept, even if the driver ends the process."""
    (tmp_path / "x").mkdir()
    source = "\n".join([*torch_with().splitlines(), *(f"        {line}" for line in change.splitlines())])
    facts = read_libraries(host_with(tmp_path, torch=source))
    assert facts.gpus == ()
    assert message in facts.gpu_error
    assert facts.has_torch


def test_output_of_libraries_is_ignored(tmp_path: Path) -> None:
    """Output of the libraries does not disturb the facts."""
    noise = 'print("{\\"versions\\": nonsense"); print("hello")'
    facts = read_libraries(host_with(tmp_path, torch=torch_with(gpu()), diffusers=f"{noise}\n{STUBS['diffusers']}"))
    assert facts.versions.keys() == {"torch", "transformers", "diffusers"}


def test_a_failed_attention_measurement_is_reported(tmp_path: Path) -> None:
    """A failed attention measurement is reported, and all other facts are kept."""
    facts = read_libraries(host_with(tmp_path, torch=torch_with(gpu())), Attention(gpu=0))
    assert facts.attention == ""
    assert "Error" in facts.attention_lines[-1]
    assert len(facts.gpus) == 1
    assert (
        read_libraries(host_with(tmp_path / "other", torch=torch_with(gpu())), Attention(gpu=1)).attention_lines == ()
    )


def test_the_kernel_is_chosen_as_in_the_generator(capsys: pytest.CaptureFixture[str]) -> None:
    """The attention kernel is chosen by the generator's own measurement."""
    question = {"device": "cpu", "heads": 4, "head_dim": 32, "num_tokens": 64, "dtype": "float32"}
    choose_attention(Facts(), question)
    facts = Libraries.model_validate_json(capsys.readouterr().out.splitlines()[-1])
    assert facts.attention == "native"
    assert any(line.startswith("attention over 64 tokens: native") for line in facts.attention_lines)


def test_every_package_of_the_services_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of the services' extras must be installed; those of other extras are optional."""
    [check] = check_packages(BOTH)
    assert check.status is Status.OK
    required = [
        "numpy",
        'no-such-a[x]>=2; extra == "generator"',
        "no-such-b; extra == 'text-encoder'",
        'no-such-c; extra == "dev"',
    ]
    monkeypatch.setattr(module, "requires", lambda _: required)
    [check] = check_packages(BOTH)
    assert (check.status, check.detail) == (Status.FAILED, "not installed: no-such-a, no-such-b")
    [check] = check_packages((Service.GENERATOR,))
    assert check.detail == "not installed: no-such-a"


def test_a_project_that_is_not_installed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an installed distribution the check fails, since the services read its version."""

    def absent(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "requires", absent)
    [check] = check_packages(BOTH)
    assert check.status is Status.FAILED
    assert "pip install" in check.fix


def test_versions_are_reported() -> None:
    """The report has Python's version and the CUDA version of torch's build."""
    [python] = check_python()
    assert python.detail.startswith("3.")
    assert "built for CUDA 13.0" in by_name(list(check_libraries(libraries(), BOTH)))["torch"].detail
    assert "built for the CPU only" in by_name(list(check_libraries(libraries(cuda=None), BOTH)))["torch"].detail
    assert json.loads(libraries(gpu()).model_dump_json())["gpus"][0]["index"] == 0
