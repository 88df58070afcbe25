"""Backends in memory: tokens are real; credentials of other kinds are what the test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ringfence.backends import Backend, TargetAccess
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState

CredentialOf = Callable[[str], str | None]
"""By target id, the credential that a test gave."""


class NoRightsNeeded(TargetAccess):
    """Nobody connects to a target here, so that no rights at any have to be named."""

    def __init__(self) -> None:
        super().__init__({})

    def check(self, target_id: str) -> None:
        """Nothing is missing."""


class GivenCredentials:
    """Hands out what the test gave for a target. It declares of itself what the real backend declares."""

    def __init__(self, real: Backend, credential_of: CredentialOf) -> None:
        self.kind: str = real.kind
        self.enforced_by = real.enforced_by
        self.own_expiry = real.own_expiry
        self.stateless = True
        """Nothing is made anywhere, so that nothing has to be removed."""
        self._real = real
        self._credential_of = credential_of

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """As the real backend has it."""
        return self._real.revocability(target)

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """The same reasons as those of the real backend; and that the test gave no credential."""
        if (found := self._real.problem(lease, target)) is not None:
            return found
        if self._credential_of(target.target_id) is None:
            return (
                f"the test gave no credential for target {target.target_id}: "
                f'target("{target.target_id}", kind="{self.kind}", credential=...)'
            )
        return None

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """What the test gave."""
        return Credential(
            kind=self.kind,
            value=self._credential_of(target.target_id) or "",
            token_type=None,
            expires_at=lease.deadline,
        )

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Nothing is there."""

    async def existing(self, target_id: str) -> frozenset[str]:
        """Nothing is there."""
        return frozenset()

    standing = existing

    async def close(self) -> None:
        """There is nothing to close."""
