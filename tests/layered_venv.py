"""Makes the packages of another venv visible in the venv that runs this; the argument is the other venv's Python.

Its own packages come first, and pip installs only those that the other venv lacks.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path


def main(python: str) -> None:
    """Add the packages of the venv of ``python``, and the folders that its ``.pth`` files add."""
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    link = Path(sysconfig.get_path("purelib"), "layered.pth")
    link.write_text(f"import site; site.addsitedir({packages!r})\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
