"""`ringfence doctor`: is everything that Ringfence stands on as it should be?"""

from __future__ import annotations

import typer

from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import print_json, print_table

_SIGNS = {"good": "ok", "bad": "WRONG", "unknown": "?"}


def doctor(as_json: JsonOption = False) -> None:
    """Examine keys, trust, Kafka, Redis, clocks and services, and say what to do. Exit 1 where one is wrong."""
    from ringfence.cli.doctor.diagnosis import examine
    from ringfence.cli.doctor.finding import Finding
    from ringfence.client.settings import ClientSettings
    from ringfence.kernel.base.settings import ServiceSettings, load

    async def work() -> list[Finding]:
        return [one async for one in examine(load(ServiceSettings), load(ClientSettings))]

    findings = run(work())
    if wants_json(as_json):
        print_json({"findings": [{"what": f.what, "verdict": f.verdict, "says": f.says} for f in findings]})
    else:
        print_table(["!", "!what", "says"], [(_SIGNS[f.verdict], f.what, f.says) for f in findings], empty="")
    if any(finding.verdict == "bad" for finding in findings):
        raise typer.Exit(1)
