"""Runs the attacks whose name, row or module contains a word, or all: ``python -m tests.attacks [WORD]``."""

import resource
import sys

from tests.attacks import bodies, connections, images, pages, peers, probes, shares, streams, upsamplers
from tests.attacks.attack import ATTACKS, Attack, execute

MODULES = (probes, bodies, connections, images, shares, streams, peers, upsamplers, pages)


def matching(word: str) -> list[Attack]:
    """The attacks with the word in their name, row or module, in the order of the rows."""
    selected = [each for each in ATTACKS if word in f"{each.row} {each.name} {each.run.__module__}"]
    return sorted(selected, key=lambda each: each.row)


def main(arguments: list[str]) -> int:
    """Run the selected attacks; return the exit status."""
    word = " ".join(arguments)
    selected = matching(word)
    if not selected:
        print(f"no attack matches {word!r}; there are {', '.join(each.name for each in matching(''))}")
        return 1
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = [execute(each) for each in selected]
    print(f"{sum(held)} of {len(held)} held")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
