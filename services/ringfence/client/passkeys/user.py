"""A person who signs with a passkey, as the identity of a connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

WAIT_S = 600.0
"""How long to wait for a signature. It counts for ten minutes, so a page that stands open longer signs in vain."""
LIFE_S = 900
"""`exp` of a command from the time of the question: the person takes their time before they sign."""


@dataclass(frozen=True, slots=True)
class PasskeyUser:
    """A person who signs with a passkey: in the place of a key file, for `Sponsor.connect` and the like.

    ```python
    async with Sponsor.connect(PasskeyUser("maria", print)) as maria:
        await maria.approve(pending)  # prints the link to the sign page, and waits
    ```
    """

    user_id: str
    show: Callable[[str], None]
    """Shows the person the link to the sign page."""
    wait_s: float = WAIT_S
