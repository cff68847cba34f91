"""Asks an advisory database about every pinned package: ``make audit``, a part of CI.

It ends with 1 if a package has a known vulnerability that is not accepted below, and with 0 and the reason if no
database can be reached. It runs without the package ``tests``, which would hide the proxies of the environment.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
CANARY = "jinja2==2.4.1"
"""A release with advisories of many years: who knows none of them knows no advisories, such as a mirror of an index."""
DATABASES = ("pypi", "osv")
LIMIT_S = 300
ACCEPTED: Mapping[str, str] = {}
"""Advisories that do not concern this project, by their id, with the reason."""

Advisories = dict[str, list[str]]
"""The ids of the advisories for each vulnerable package, ``name==version``."""
Ask = Callable[[str, Path], Advisories]


class Unreachable(Exception):
    """A database did not answer; the message says why."""


def ask(database: str, requirements: Path) -> Advisories:
    """Return the known vulnerabilities of pinned requirements.

    Raises:
        Unreachable: there is no answer, whatever the cause.
    """
    options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--vulnerability-service",
        database,
        "-r",
        str(requirements),
        *options,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"no answer within {LIMIT_S} s") from None
    except ValueError:
        raise Unreachable((done.stderr.strip().splitlines() or ["no output"])[-1][:300]) from None
    return {
        f"{package['name']}=={package['version']}": [advisory["id"] for advisory in package["vulns"]]
        for package in answer["dependencies"]
        if package.get("vulns")
    }


def first_database(ask: Ask) -> str:
    """Return a database that knows the canary's vulnerabilities; raise ``Unreachable`` if there is none."""
    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder, "canary.txt")
        canary.write_text(CANARY, encoding="utf-8")
        for database in DATABASES:
            try:
                if ask(database, canary):
                    return database
                reasons.append(f"{database}: no advisory for {CANARY}, so it has none")
            except Unreachable as error:
                reasons.append(f"{database}: {error}")
    raise Unreachable("; ".join(reasons))


def audit(ask: Ask, accepted: Mapping[str, str] = ACCEPTED) -> int:
    """Print the result for all pinned packages; return the exit status."""
    try:
        database = first_database(ask)
        advisories = ask(database, CONSTRAINTS)
    except Unreachable as error:
        print(f"audit skipped: {error}")
        return 0
    for package, ids in advisories.items():
        for advisory in ids:
            print(f"{package}: {advisory}: {accepted.get(advisory, 'update it, or accept it with a reason')}")
    is_bad = any(advisory not in accepted for ids in advisories.values() for advisory in ids)
    print(f"audit by {database}: {'vulnerable' if is_bad else 'no vulnerability that is not accepted'}")
    return int(is_bad)


if __name__ == "__main__":
    if importlib.util.find_spec("pip_audit") is None:
        sys.exit("audit: pip-audit is not installed; run make audit")
    sys.exit(audit(ask))
