"""The ``flux2`` command."""
