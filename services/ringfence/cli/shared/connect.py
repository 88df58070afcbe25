"""Connects as who is calling. The SDK is imported by the command that connects, not by those beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from ringfence.cli.shared.options import call

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from ringfence.client.admin.administrator import Administrator
    from ringfence.client.agent.agent import Agent
    from ringfence.client.approvals.grants import Grantor
    from ringfence.client.approvals.sponsor import Sponsor
    from ringfence.client.passkeys.questions import PasskeyUser

T = TypeVar("T")


def administer(key: Path | PasskeyUser | None, command: Callable[[Administrator], Awaitable[T]]) -> T:
    """Connect as an administrator, run one command, and disconnect."""
    return call(administrator(key), command)


def administrator(key: Path | PasskeyUser | None, **more: Any) -> Administrator:
    """As `Administrator.connect`."""
    from ringfence.client.admin.administrator import Administrator

    return Administrator.connect(key, **more)


def agent(key: Path | None, **more: Any) -> Agent:
    """As `Agent.connect`."""
    from ringfence.client.agent.agent import Agent

    return Agent.connect(key, **more)


def grantor(key: Path | PasskeyUser | None, **more: Any) -> Grantor:
    """As `Grantor.connect`."""
    from ringfence.client.approvals.grants import Grantor

    return Grantor.connect(key, **more)


def sponsor(key: Path | PasskeyUser | None, **more: Any) -> Sponsor:
    """As `Sponsor.connect`."""
    from ringfence.client.approvals.sponsor import Sponsor

    return Sponsor.connect(key, **more)
