"""`ringfence rebuild`: compare Redis with Kafka, or rebuild it from Kafka."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import print_json, print_table, say
from ringfence.cli.shared.progress import progress
from ringfence.cli.shared.tables import prose

if TYPE_CHECKING:
    from ringfence.kernel.base.settings import ServiceSettings
    from ringfence.revoker.consistency.compare import LeaseDifference

_TAKEN_UP_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.1


def rebuild(
    check: Annotated[
        bool,
        typer.Option("--check", help="Only list what Redis has otherwise than Kafka; exit 1 if anything."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make Redis hold again what Kafka knows of leases and revocations. Issuing stops while a revoker does it.

    It happens by itself when Redis is lost; this is for when somebody has changed its keys. Run it with the settings of
    a service.
    """
    from ringfence.kernel.base.settings import ServiceSettings, load

    settings = load(ServiceSettings)
    if check:
        with progress("comparing Redis with Kafka", as_json=as_json):
            differences = run(_differences(settings))
        _show(differences, wants_json(as_json))
        return
    with progress("waiting for a revoker to take it up", as_json=as_json) as line:
        alive, took_s = run(_rebuilt(settings, lambda: line.say("a revoker rebuilds Redis")))
    if wants_json(as_json):
        print_json({"rebuilt": True, "leases": alive, "took_s": round(took_s, 2)})
    else:
        say(f"rebuilt in {took_s:.1f} s: {alive} leases are alive")


def _show(differences: list[LeaseDifference], as_json: bool) -> None:
    rows = [(one.what, one.about, one.kafka, one.redis) for one in differences]
    if as_json:
        names = ("what", "about", "kafka", "redis")
        print_json({"differences": [dict(zip(names, row, strict=True)) for row in rows]})
    else:
        empty = "Redis holds what Kafka knows"
        print_table(["what", "lease or fence", prose("Kafka has"), prose("Redis has")], rows, empty=empty)
    if differences:
        raise typer.Exit(1)


async def _differences(settings: ServiceSettings) -> list[LeaseDifference]:
    from ringfence.kernel.base.clock import SystemClock
    from ringfence.kernel.base.settings import load
    from ringfence.revoker.consistency.compare import checking
    from ringfence.revoker.settings import RevokerSettings

    record_keep_ms = load(RevokerSettings).record_keep_s * 1000
    async with checking(settings, SystemClock(), record_keep_ms=record_keep_ms) as checker:
        return await checker.differences()


async def _rebuilt(settings: ServiceSettings, on_taken_up: Callable[[], None]) -> tuple[int, float]:
    """Make a revoker rebuild Redis. Returns the number of live leases after it, and the seconds that it took.

    `on_taken_up` is called once, when a revoker has begun.
    """
    from ringfence.kernel.base.errors import RingfenceError
    from ringfence.model.lease_store import LeaseStore, LostError, Restoration
    from ringfence.model.leases.lifecycle import ALL_LEASES

    restoration, store = Restoration(settings), LeaseStore(settings)
    start = heard = time.monotonic()
    taken_up = False
    try:
        await restoration.declare_lost()
        while True:
            try:
                await store.connect()
                return len(await store.find(ALL_LEASES)), time.monotonic() - start
            except LostError:
                pass
            now = time.monotonic()
            if await restoration.is_under_way():
                heard = now
                if not taken_up:
                    taken_up = True
                    on_taken_up()
            if now - heard > _TAKEN_UP_WITHIN_S:
                raise RingfenceError(
                    f"no revoker took it up within {_TAKEN_UP_WITHIN_S:.0f} s; run: ringfence serve revoker"
                )
            await asyncio.sleep(_LOOK_EVERY_S)
    finally:
        await _closed(restoration, store)


async def _closed(*open: Any) -> None:
    for one in open:
        await one.close()
