"""Questions for the sign page: what a person is asked to sign, with the signed messages that it is shown by.

Anybody may compose a question. The page verifies the evidence up to its pinned root, and shows only that.

A person who signs with a passkey, as the identity of a connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote
from ringfence.client.errors import InvalidCallError
from ringfence.client.signed_messages import (
    Subject,
    approval_subjects_of,
    evidence_of,
    subjects_of,
    unstamped,
)
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import Claims
from ringfence.messages.lease import RevocationRequest
from ringfence.model.records.directory import Directory


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


BEGIN: Final = "\x01"
END: Final = "\x02"
"""Around what is unwrapped. JSON has no such character: it would be written as an escape."""
_BASE64URL: Final = re.compile(r"eyJ[A-Za-z0-9_-]+")
"""Base64url of what begins like a JSON object."""


def compose(
    user_id: str,
    claims: Claims,
    directory: Directory,
    trust: TrustStore,
    *,
    evidence: Mapping[str, str],
    return_to: str | None = None,
) -> bytes:
    """Compose the question whether `user_id` signs `claims`.

    Args:
        claims: the message; what the page stamps is left out.
        evidence: further signed messages by name, as the page wants them for this message.
        return_to: the URL that takes the answer; None: the person copies it.

    Returns JSON. Raises InvalidCallError if no passkey signs such a message here, or a record is missing;
    UnavailableError if there is no trust bundle.
    """
    if claims.passkey_use != "sign":
        raise InvalidCallError(f"no passkey signs {claims.typ}: it needs a key file")
    subjects = list(subjects_of(claims))
    if isinstance(claims, RevocationRequest):
        subjects = [one for one in subjects if directory.entry(*one)]
    subjects = [("user", user_id), *subjects, *approval_subjects_of(claims, directory)]
    question = {
        "user": user_id,
        "message": {"typ": claims.typ, "claims": unstamped(claims)},
        "evidence": {**evidence_of(directory, trust, subjects), **evidence},
    }
    return _json(question | ({"return_to": return_to} if return_to else {}))


def invitation_question(
    invitation: str, user_id: str, signer_id: str, directory: Directory, trust: TrustStore
) -> bytes:
    """The question of an invitation (`user.invite`, signed by `signer_id`) for a user, as JSON. Raises as `compose`."""
    subjects: list[Subject] = [("user", signer_id)]
    if directory.user(user_id) is not None:
        subjects.append(("user", user_id))
    return _json({"invitation": invitation, "evidence": evidence_of(directory, trust, subjects)})


def question_link(origin: str, question: bytes) -> str:
    """The link that opens the sign page at `origin` with a question in it. The part after `#` reaches no server."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = unwrapped(question.decode()).encode()
    return f"{origin}/#p={b64encode(packer.compress(packed) + packer.flush())}"


def unwrapped(text: str) -> str:
    """JSON whose base64url of JSON, such as the parts of a JWS, is written out between `BEGIN` and `END`, at any depth.

    Text compresses far better than its base64url. The page writes it back as it was (`exchange.js`), so it verifies the
    very bytes that were signed: no signature depends on this form.
    """
    return _BASE64URL.sub(lambda run: _unwrapped_run(run[0]), text)


def _unwrapped_run(run: str) -> str:
    try:
        text = b64decode(run).decode()  # canonical base64url and UTF-8 alone: one text for each, both ways
    except ValueError:
        return run
    if not text.startswith("{") or BEGIN in text or END in text:
        return run
    return f"{BEGIN}{unwrapped(text)}{END}"


def server_link(origin: str, url: str) -> str:
    """The link that opens the sign page at `origin` with the question of a question server, which is at `url`."""
    return f"{origin}/#from={quote(url, safe='')}"


def sign_origin(trust: TrustStore, at_s: float) -> str:
    """The origin where people sign now, by the trust bundle. Raises InvalidCallError if it names none."""
    trust.require(at_s)
    for origin in trust.origins(at_s):
        if origin.use == "sign":
            return origin.origin
    raise InvalidCallError(
        "the trust bundle names no sign page, so nobody signs with passkeys here; see: ringfence init --sign-origin"
    )


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
