"""Writes the references in `docs/reference/` and `schemas/` from the code: `python -m tools.references`."""
