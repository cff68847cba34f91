"""The list of mutants, and how one is applied to a copy of the tree."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("mutants.toml")


class StaleMutant(Exception):
    """The line that a mutant changes is missing from its file, or occurs more than once."""


@dataclass(frozen=True)
class Mutant:
    """A one-line change, and the tests that fail with it."""

    name: str
    """The mistake in a sentence."""
    file: str
    """Relative to the root of the tree."""
    line: str
    """The original line without its indentation."""
    becomes: str
    """The changed line."""
    tests: tuple[str, ...]
    """Files or node ids of pytest."""
    after: str = ""
    """The preceding line, if the line occurs more than once."""

    def apply(self, root: Path) -> str:
        """Change the file below ``root``.

        Returns:
            The file's text from before, for ``undo``.

        Raises:
            StaleMutant: the line is not found exactly once.
        """
        path = root / self.file
        before = path.read_text(encoding="utf-8")
        lines = before.splitlines(keepends=True)
        number = self.find(before)
        indentation = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        lines[number] = f"{indentation}{self.becomes}\n"
        path.write_text("".join(lines), encoding="utf-8")
        return before

    def undo(self, root: Path, before: str) -> None:
        """Restore the file below ``root``."""
        (root / self.file).write_text(before, encoding="utf-8")

    def find(self, text: str) -> int:
        """The index of the line in the file's text.

        Raises:
            StaleMutant: it is not found exactly once.
        """
        lines = ["", *(line.strip() for line in text.splitlines())]
        matches = [
            number
            for number in range(1, len(lines))
            if lines[number] == self.line and self.after in ("", lines[number - 1])
        ]
        if len(matches) != 1:
            raise StaleMutant(f"{self.file}: found {len(matches)} times, not once: {self.line}")
        return matches[0] - 1


def load_mutants(file: Path = FILE) -> list[Mutant]:
    """The mutants in the order of their file."""
    entries = tomllib.loads(file.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]
