"""Counts of connections and bytes of a proxy or a relay."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Numbers of connections that reached the gateway's socket, and of all bytes on them, heads of HTTP included."""

    connections: int = 0
    sent_bytes: int = 0
    """To the gateway."""
    received_bytes: int = 0

    def sent(self, number: int) -> None:
        self.sent_bytes += number

    def received(self, number: int) -> None:
        self.received_bytes += number
