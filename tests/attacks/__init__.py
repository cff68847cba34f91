"""Attacks on the two real processes with the demo model: ``make attack``, or ``python -m tests.attacks [WORD]``.

Each shows one promise of ``docs/security.md``: what must hold is its docstring, and its figures are printed. The
attacks know the services only from outside. They are not a part of the test suite, because their figures depend on the
machine.
"""
