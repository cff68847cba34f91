"""Applies each mutant to a copy of the tree and runs its tests, which must fail: ``python -m tests.mutants [WORD]``.

A mutant survives if its tests pass, since no test would detect that mistake. With WORDs only the mutants whose name or
file contains one of them are tried. The checkout is never changed.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.mutants.catalog import Mutant, StaleMutant, load_mutants

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider", "--tb=line")
TIMEOUT_S = 600
"""The limit for one mutant on a busy machine. A mutant that makes its tests hang needs one that fails."""
TESTS_FAILED = 1
"""Exit statuses of pytest. Others mean that tests could not be collected, for instance because of a syntax error."""


class Verdict(StrEnum):
    """The result of a mutant's tests."""

    KILLED = "killed"
    SURVIVED = "SURVIVED"
    TIMED_OUT = "TIMED OUT"
    BROKEN = "BROKEN"


@dataclass(frozen=True)
class Outcome:
    """A mutant's row in the table."""

    mutant: Mutant
    verdict: Verdict
    seconds: float
    detail: str
    """The first test that failed, or why no test ran."""

    @property
    def is_noticed(self) -> bool:
        """Whether the tests detected the change."""
        return self.verdict is Verdict.KILLED

    def __str__(self) -> str:
        return f"{self.verdict:9}  {self.seconds:5.0f} s  {self.mutant.name}  [{self.detail}]"


def copy_tree(target: Path) -> Path:
    """Copy the files of the working tree that git does not ignore to ``target``."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)  # flux2_shared is a link to shared
    return target


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run pytest in ``tree`` until the first failure. No bytecode is written, since it could outlive its mutant."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = os.environ | threads | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*PYTEST, *tests], cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def try_mutant(mutant: Mutant, tree: Path) -> Outcome:
    """Apply ``mutant`` to ``tree``, run its tests, and restore the tree."""
    began = time.monotonic()
    before = mutant.apply(tree)
    try:
        done = run_tests(tree, mutant.tests, TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Outcome(mutant, Verdict.TIMED_OUT, time.monotonic() - began, f"after {TIMEOUT_S} s")
    finally:
        mutant.undo(tree, before)
    return Outcome(mutant, verdict_of(done), time.monotonic() - began, first_failure(done.stdout))


def verdict_of(done: subprocess.CompletedProcess[str]) -> Verdict:
    """The meaning of pytest's exit status. A process that crashes after a failed test has detected the mutant, too."""
    if done.returncode == 0:
        return Verdict.SURVIVED
    has_failed = done.returncode == TESTS_FAILED or re.search(r"^FAILED ", done.stdout, re.MULTILINE)
    return Verdict.KILLED if has_failed else Verdict.BROKEN


def first_failure(output: str) -> str:
    """The first test in pytest's summary, or its last line."""
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    return failed[1] if failed else (output.strip().splitlines() or ["no output"])[-1]


def try_all(mutants: Sequence[Mutant], trees: Sequence[Path]) -> list[Outcome]:
    """The outcome of each mutant, with as many at a time as there are trees; each is printed when it ends."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def try_one(mutant: Mutant) -> Outcome:
        tree = free.get()
        outcome = try_mutant(mutant, tree)
        free.put(tree)
        print(outcome, flush=True)
        return outcome

    with ThreadPoolExecutor(len(trees)) as workers:
        return list(workers.map(try_one, mutants))


def selected(words: Sequence[str]) -> list[Mutant]:
    """The mutants whose name or file contains one of ``words``; without words all of them."""
    return [m for m in load_mutants() if not words or any(word in f"{m.name} {m.file}" for word in words)]


def stale(mutants: Sequence[Mutant]) -> list[str]:
    """The problems of mutants whose line is missing, or occurs more than once."""
    problems = []
    for mutant in mutants:
        try:
            mutant.find((ROOT / mutant.file).read_text(encoding="utf-8"))
        except (OSError, StaleMutant) as error:
            problems.append(f"{mutant.name}: {error}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants; the status is 0 if the tests detected every one."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="try one-line changes of the product")
    parser.add_argument("words", nargs="*", help="only the mutants whose name or file holds one of them")
    parser.add_argument("--jobs", type=int, default=2, help="how many to try at a time")
    options = parser.parse_args(arguments)
    mutants = selected(options.words)
    if problems := stale(mutants):
        print("these mutants have to follow the code that they change:", *problems, sep="\n")
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(Path(folder, str(number))) for number in range(options.jobs)]
        unchanged = run_tests(trees[0], sorted({test for mutant in mutants for test in mutant.tests}))
        if unchanged.returncode != 0:
            print(f"the tests fail without any change:\n{unchanged.stdout}")
            return 1
        outcomes = try_all(mutants, trees)
    missed = [outcome for outcome in outcomes if not outcome.is_noticed]
    print(f"\n{len(outcomes)} mutants, {len(missed)} not noticed, {(time.monotonic() - began) / 60:.1f} minutes")
    print(*missed, sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
