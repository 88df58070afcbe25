"""Keys of people: the one look-up by which everybody finds the key that verifies a person's signature."""

from __future__ import annotations

from ringfence.kernel.crypto.keys import valid_key
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import PasskeyKey, VerificationKey
from ringfence.messages.base import KeyRecord


def user_key(keys: tuple[KeyRecord, ...], kid: str, at_s: float, trust: TrustStore) -> VerificationKey | None:
    """The key `kid` among `keys`, those of a person, if it is valid at `at_s`; else None.

    A passkey verifies only what was appended at `at_s`: on the origins that the trust bundle had then, and soon after
    it was signed. So `at_s` is the append time (seconds) of the message itself, also where another message embeds it
    later. Of a message that was never appended by itself, it is that of the message that embeds it.
    """
    passkey = next((one for one in keys if one.kid == kid and one.use is not None), None)
    if passkey is not None:
        return PasskeyKey.of(passkey, trust.origins(at_s), at_s)
    return valid_key(keys, kid, at_s)
