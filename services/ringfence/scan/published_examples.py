"""Published example credentials: vendors print them in documentation, or ship them for tests and emulators.

The module has digests alone, so that no scanner reports it.
"""

from __future__ import annotations

import hashlib
from typing import Final

_BEGIN: Final = 64
"""So many characters of a value are compared: a private key is long."""
_DIGESTS: Final = frozenset((
    "2cafc0970149a84f3b9e62eaf169f36f", "f2d6ca16515033e5dce14eba840b979d",  # test keys in the documentation of Stripe
    "f5e95c9954635b65acab57e6d5ea663e",  # the test secret of reCAPTCHA
    "e1bd39a75f17bcc720c396df11280bad",  # Azurite and the storage emulator before it
    "361d141620e684eba1eb1220e369cedf",  # the emulator of Cosmos DB
    "0b5dd075ccdd03c42f4edda8e299e683",  # the documentation of Telegram bots
    "f5375a46365089a84f4f822b70d44e74",  # the documentation of Slack
    "ac9265e56c79b234607ec72c53753cfe",  # the documentation of Google Maps
    "3543c50b0cb9cea8e55eb1f529b79f04",  # the documentation of GitHub
    "b64ba217d95e8f030fd632d75e96fcdb",  # the token on the first page of jwt.io
    "f0386f9be1fe905fb2f97a8daff11a9b",  # the client of the gcloud command: those of installed programs are no secrets
    "eca7c0796c0d28714d81ae48ae76a194",  # the private key of Vagrant's boxes
))  # fmt: skip


def is_published(value: str) -> bool:
    """Return whether a value is a published example."""
    return hashlib.sha256(value[:_BEGIN].encode("utf-8", "surrogatepass")).hexdigest()[:32] in _DIGESTS
