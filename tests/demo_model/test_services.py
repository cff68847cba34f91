"""How ``make serve`` starts the services."""

import pytest

from demo_model.services import MODULES, OPENMP, openmp_environment


@pytest.fixture(autouse=True)
def without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of OpenMP is set."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)


def test_each_service_has_its_defaults() -> None:
    """One thread for the text encoder, and a bounded spin for the generator's threads."""
    assert openmp_environment(OPENMP[MODULES[0]]) == {"OMP_NUM_THREADS": "1"}
    assert openmp_environment(OPENMP[MODULES[1]]).keys() == {"GOMP_SPINCOUNT"}


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user set stays as it is."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert openmp_environment(OPENMP[MODULES[0]]) == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "7"}
    assert openmp_environment(OPENMP[MODULES[1]]) == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "7"}


def test_a_wait_policy_of_the_user_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spin count overrules a wait policy in libgomp, so the default count is left out where a policy is set."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert openmp_environment(OPENMP[MODULES[1]]) == {"OMP_WAIT_POLICY": "active"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert openmp_environment(OPENMP[MODULES[1]]) == {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "7"}
