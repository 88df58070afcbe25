"""Offers of agents: the present sponsor gives another user an address, at which that user consents to take it over.

Neither sees the other's records. The address is sealed, and holds the session statement of who offers: by it the
console reads that one agent for whoever has the address and is signed in. It ends with the session of who made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from ringfence.client.errors import ApiError
from ringfence.console.reads import SessionReads
from ringfence.console.security import SealedValues, Session, Sessions


@dataclass(frozen=True, slots=True)
class Offer:
    """An agent that its sponsor would hand on."""

    agent_id: str
    by: str
    """The user who offers it."""
    statement: str
    """Their session statement."""
    cookie_digest: str
    """Of their session: the offer ends when they sign out."""
    consent: str | None = None
    """The consent of who takes it over, once it is signed."""
    taken_by: str | None = None


class Offers:
    """Makes and opens the addresses of offers."""

    def __init__(
        self, sealed: SealedValues, sessions: Sessions, reads: Callable[[str | None], SessionReads]
    ) -> None:
        self._sealed = sealed
        self._sessions = sessions
        self._reads = reads

    def sealed(self, offer: Offer) -> str:
        """The last part of its path."""
        return self._sealed.seal("offer", asdict(offer))

    def opened(self, text: str) -> Offer:
        """The offer of a path. Raises ApiError (404)."""
        value = self._sealed.open("offer", text)
        if value is None or self._sessions.is_over(value["cookie_digest"]):
            raise ApiError("there is no such offer, or it is over", status=404)
        return Offer(**value)

    def reads(self, offer: Offer) -> SessionReads:
        """Reads for who made the offer."""
        return self._reads(offer.statement)

    async def make(self, reads: SessionReads, session: Session, agent_id: str) -> Offer:
        """An offer of an agent that the person of a session sees. Raises ApiError (404)."""
        await reads.record("agent", agent_id)
        return Offer(agent_id, session.user_id, session.statement, session.cookie_digest)
