"""Sealed request states: a server's `requestState` and the gateway's own, which a client echoes with its retry.

The client holds the state between two rounds of one request (MCP 2026-07-28, multi round-trip requests), so what comes
back is the client's word. A state is sealed with AES-256-GCM to the agent, task, lease, target and call that it was
made for: no other sender, and no other call, can use it. It ends with the lease.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final, Literal

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.messages.codes import Code

_PREFIX: Final = "rf1."
"""Also the additional data of the encryption: a state of another format cannot be opened as one of this."""
_PURPOSE: Final = b"ringfence mcp request state 1"
_NONCE_BYTES: Final = 12
_MAX_KEYS: Final = 3
"""The current key, and those before it that this process has used: a rotation breaks no round."""

Round = Literal["server", "approval"]
"""What a retry is for: the server asked for input, or a person is asked for approval."""


class RequestStateError(RingfenceError):
    """Raised when a state cannot be opened: it was changed, or another gateway sealed it."""

    code = Code.MCP_STATE_INVALID


@dataclass(frozen=True, slots=True)
class RequestState:
    round: Round
    agent_id: str
    task_id: str
    lease_id: str
    target_id: str
    call: str
    """The digest of the call: `canonical.call_digest` of a round of the server, `canonical.digest` of an approval."""
    expires_at_ms: int
    state: str | None
    """The server's own state; None if it has none."""


class RequestStates:
    """Seals and opens states."""

    def __init__(self, key: Callable[[], SigningKey]) -> None:
        """`key`: returns the current key of this service. Replicas with the same key open each other's states."""
        self._key = key
        self._ciphers: BoundedDict[str, AESGCM] = BoundedDict(_MAX_KEYS)

    def seal(self, state: RequestState) -> str:
        """Seal a state. Returns a text for `requestState`."""
        kid = self._current()
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._ciphers[kid].encrypt(nonce, orjson.dumps(asdict(state)), _PREFIX.encode())
        return f"{_PREFIX}{b64encode(nonce + sealed)}"

    def open(self, text: str) -> RequestState:
        """Open a sealed state. Raises RequestStateError."""
        self._current()
        if not text.startswith(_PREFIX):
            raise _unusable()
        try:
            raw = b64decode(text.removeprefix(_PREFIX))
        except ValueError:
            raise _unusable() from None
        for cipher in self._ciphers.values():
            try:
                opened = cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _PREFIX.encode())
            except (InvalidTag, ValueError):
                continue
            return RequestState(**orjson.loads(opened))
        raise _unusable()

    def _current(self) -> str:
        key = self._key()
        if key.kid not in self._ciphers:
            self._ciphers[key.kid] = AESGCM(key.derived_key(_PURPOSE))
        return key.kid


def _unusable() -> RequestStateError:
    return RequestStateError(
        "this requestState was changed, or is none of this gateway: send the request without it"
    )
