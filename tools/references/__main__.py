"""Writes all references, or compares those in git with the code: `python -m tools.references [--check]`.

The others are built: into the site by `make docs`, and into `build/reference/` by this command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from tools import cli_reference, metrics_reference
from tools.public_names import ROOT, import_all
from tools.references import error_codes, event_codes, http_apis, sdk, settings, unmapped_fields
from tools.schemas.generate import SERVICES, service_description

BUILT = ROOT / "build/reference"


def built() -> dict[str, str]:
    """Every reference that is not in git: its path below `reference/`, and its text."""
    import_all()
    return {
        "sdk.md": sdk.reference(),
        **{f"openapi/{name}": text for name, text in http_apis.documents().items()},
        **{f"asyncapi/{role}.yaml": service_description(role) for role in SERVICES},
    }


def files() -> dict[str, str]:
    """Every generated reference in git: its path in the repository, and its text."""
    import_all()
    return {
        "docs/cli.md": cli_reference.reference(),
        "docs/metrics.md": metrics_reference.reference(),
        "docs/reference/settings.md": settings.reference(),
        "docs/reference/error-codes.md": error_codes.reference(),
        "docs/reference/event-codes.md": event_codes.reference(),
        "docs/reference/unmapped-fields.md": unmapped_fields.reference(),
        "docs/reference/unmapped-fields.json": unmapped_fields.written_schema(),
        "docs/reference/http-apis.md": http_apis.reference(),
    }


def outdated(generated: Mapping[str, str]) -> list[str]:
    """The references that differ from the code."""
    return [
        path
        for path, text in generated.items()
        if not (ROOT / path).exists() or (ROOT / path).read_text() != text
    ]


def main() -> int:
    """Write what differs; with `--check` only name it, and return 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.references", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail where something differs"
    )
    options = parser.parse_args()
    generated = files()
    if not options.check:
        for path, text in built().items():
            (BUILT / path).parent.mkdir(parents=True, exist_ok=True)
            (BUILT / path).write_text(text)
    differing = outdated(generated)
    for path in differing:
        if options.check:
            print(
                f"{path} differs from the code: run 'make references' and commit the result", file=sys.stderr
            )
            continue
        print(f"written: {path}")
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(generated[path])
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
