"""`python -m bench [NAME...] [OPTIONS]`; all but `soak` by default."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from bench import (
    audit,
    backends,
    bus,
    cli,
    compromise,
    console,
    credentials,
    ends,
    gateway,
    idle,
    inventory,
    killswitch,
    leases,
    policy,
    rebuild,
    runs,
    scan,
    soak,
    text,
)
from bench.machine import describe, pace

BENCHMARKS: dict[str, Callable[..., None]] = {
    "credentials": credentials.run,
    "idle": idle.run,
    "cli": cli.run,
    "bus": bus.run,
    "leases": leases.run,
    "ends": ends.run,
    "killswitch": killswitch.run,
    "rebuild": rebuild.run,
    "compromise": compromise.run,
    "policy": policy.run,
    "inventory": inventory.run,
    "console": console.run,
    "audit": audit.run,
    "backends": backends.run,
    "gateway": gateway.run,
    "run": runs.run,
    "scan": scan.run,
    "soak": soak.run,
    "text": text.run,
}


def main() -> None:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], default=[], metavar="NAME")
    parser.add_argument("--kafka", choices=["embedded", "apache"], default="embedded")
    parser.add_argument("--events", type=int, default=audit.EVENTS, help="of audit: how many its index has")
    parser.add_argument("--revokers", type=int, default=1, help="of ends: how many share the work")
    parser.add_argument("--runs", type=int, default=runs.RUNS, help="of run: how many go on at once")
    parser.add_argument("--agents", type=int, default=console.AGENTS, help="of console and compromise")
    parser.add_argument("--hours", type=float, default=soak.HOURS, help="of soak: how long the load lasts")
    options = parser.parse_args()
    print(f"machine: {describe()}\n{pace()}")
    for name in options.names or [name for name in BENCHMARKS if name != "soak"]:
        print(f"\n{name} (Kafka: {options.kafka})")
        if name == "audit":
            audit.run(options.kafka, options.events)
        elif name == "ends":
            ends.run(options.kafka, options.revokers)
        elif name == "console":
            console.run(options.kafka, options.agents)
        elif name == "compromise":
            compromise.run(options.kafka, options.agents)
        elif name == "soak":
            soak.run(options.kafka, options.hours)
        elif name == "run":
            runs.run(options.kafka, options.runs)
        else:
            BENCHMARKS[name](options.kafka)
        print(pace())


if __name__ == "__main__":
    main()
