"""Candidates, the output of readers: a secret value and the facts of its location. `classify` judges plain settings."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from ringfence.scan import kinds, names
from ringfence.scan.findings import Access, Confidence, Pattern, SecretValue
from ringfence.scan.kinds import FORMATS, SCHEMES, Format, Kind

UNKNOWN_ACCESS: Final = Access()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible credential, from which the scanner makes a finding."""

    field: str
    kind: Kind
    value: SecretValue | None = None
    """None if a credential is there whose value the scan does not read, such as the keys of an SSH agent."""
    opens: Access = UNKNOWN_ACCESS
    used_by: tuple[str, ...] = ()
    line: int | None = None
    """From 1. The scanner looks for the value in the file where the reader gives none."""
    confidence: Confidence = "certain"
    pattern: Pattern | None = None
    """Instead of the kind's."""
    remarks: tuple[str, ...] = ()


URL_WITH_PASSWORD: Final = re.compile(
    r"([a-z][a-z0-9+.-]{1,20})://([^\s/:@\"'<>`\\]{0,128}):([^\s/@\"'<>`\\]{1,256})@([A-Za-z0-9_.\[\]:-]{1,253})",
    re.IGNORECASE,
)
_SLACK_URL: Final = "hooks.slack.com"
_BASIC: Final = re.compile(r"\bBasic\s+([A-Za-z0-9+/]{8,}={0,2})(?![A-Za-z0-9+/])", re.IGNORECASE)
_BEARER: Final = re.compile(r"\b(?:Bearer|token)\s+([A-Za-z0-9._~+/-]{16,}={0,2})", re.IGNORECASE)
JWT: Final = re.compile(r"(?<![\w.-])(eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,})(?![\w.-])")


_SHORTEST: Final = 20
"""No credential of a known format is shorter, and none has a space in it."""
_SHORTEST_PREFIX: Final = 4
"""Shorter ones, such as `sk-`, begin the keys of several issuers."""
_MOST_SPLIT: Final = 512 * 1024
_MARKERS: Final = tuple((one.marker.encode(), one) for one in FORMATS)


def formats_marked(data: bytes) -> list[Format]:
    """Return the formats whose marker is in a word of a file that is long enough. Searches less than the whole file."""
    if len(data) <= _MOST_SPLIT:
        data = b" ".join([word for word in data.split() if len(word) >= _SHORTEST])
    return [one for marker, one in _MARKERS if marker in data]


def formats_in(text: str, among: Sequence[Format] = FORMATS) -> Iterator[tuple[Format, str, int]]:
    """Yield each credential whose format shows its kind: the format, the value, and its offset in the text."""
    for one in among:
        if one.marker not in text:
            continue
        for match in one.regex.finditer(text):
            group = 1 if one.regex.groups else 0
            value = match[group]
            if (
                (one.check is not None and not one.check(value))
                or names.is_placeholder(value)
                or names.is_counted(value)
            ):
                continue
            yield one, value, match.start(group)


def is_counterfeit(text: str) -> bool:
    """Return whether a text has the format of a known credential, but a wrong checksum."""
    return any(
        one.regex.fullmatch(text) and not _is_valid(one, text) for one in FORMATS if one.marker in text
    )


def _is_valid(one: Format, text: str) -> bool:
    match = one.regex.fullmatch(text)
    return match is not None and (one.check is None or one.check(match[1] if one.regex.groups else match[0]))


def kind_of_invalid(text: str) -> Kind | None:
    """Return the kind that begins like a text which has not its format: the length or the checksum is wrong."""
    begun = [
        one for one in FORMATS
        if one.public is not None and (match := one.public.match(text)) and match.end() >= _SHORTEST_PREFIX
    ]  # fmt: skip
    return None if not begun or any(_is_valid(one, text) for one in begun) else begun[0].kind


MARKERS: Final = frozenset(one.marker for one in FORMATS)
"""The text that all credentials of a kind share, also in their middle."""


def public_prefix_length(text: str) -> int:
    """Return the length of the prefix that all credentials of the kind share, such as `github_pat_`."""
    found = (one.public.match(text) for one in FORMATS if one.public is not None)
    return max((match.end() for match in found if match is not None), default=0)


def of_format(text: str, field: str, **more: Any) -> Candidate | None:
    """Return a candidate for the first credential of a known format in a text; None if there is none."""
    for one, value, _ in formats_in(text):
        return candidate_of(one.kind, value, field, **more)
    if (match := JWT.search(text)) and (found := of_jwt(match[1], field, **more)):
        return found
    return None


def candidate_of(kind: Kind, value: str, field: str, **more: Any) -> Candidate:
    """Return a candidate with every fact that its value shows offline."""
    given = more.pop("opens", None) or Access()
    opens = replace(
        Access(service=kind.service, host=kind.host or None),
        **{name: getattr(given, name) for name in given.words()},
    )
    if (
        kind.id in ("aws-access-key", "aws-session")
        and value[:4] in ("AKIA", "ASIA")
        and opens.account is None
    ):
        opens = replace(opens, account=kinds.aws_account(value))
    if invalid := kind_of_invalid(value):
        more["remarks"] = (
            *more.get("remarks", ()),
            f"format not valid: no {invalid.title} has this length or checksum",
        )
    return Candidate(field, kind, SecretValue(value), opens, **more)


def of_jwt(token: str, field: str, *, kind: Kind | None = None, **more: Any) -> Candidate | None:
    """Return a candidate for a JWT with its unverified claims; None if it is no JWT."""
    parts = kinds.jwt_parts(token)
    if parts is None:
        return None
    claims = parts[1]
    subject = (
        _text(claims.get("email")) or _text(claims.get("preferred_username")) or _text(claims.get("sub"))
    )
    issuer = _text(claims.get("iss"))
    raw_scopes = claims.get("scope") or claims.get("scp") or claims.get("scopes") or ()
    scopes = raw_scopes.split() if isinstance(raw_scopes, str) else raw_scopes
    expires = claims.get("exp")
    is_service_account = "kubernetes.io" in claims or str(claims.get("sub", "")).startswith(
        "system:serviceaccount:"
    )
    if kind is None:
        kind = kinds.KUBERNETES_SERVICE_ACCOUNT if is_service_account else kinds.JWT
        if str(claims.get("sub", "")).endswith(".gserviceaccount.com") or claims.get("idtyp") == "app":
            kind = replace(kinds.JWT, pattern=Pattern.SERVICE_ACCOUNT)
    given = more.pop("opens", None) or Access()
    opens = Access(
        service=given.service or kind.service,
        host=given.host or kind.host or host_of(issuer or ""),
        account=given.account,
        role=given.role or _text(claims.get("role")),
        issuer=issuer,
        subject=subject or given.subject,
        scopes=tuple(str(one)[:100] for one in scopes[:50]) if isinstance(scopes, Sequence) else (),
        expires_s=int(expires) if isinstance(expires, int | float) and 0 < expires < 10**11 else None,
    )
    return Candidate(field, kind, SecretValue(token), opens, **more)


def of_login(
    user: str, password: str, field: str, kind: Kind, *, opens: Access | None = None, **more: Any
) -> Iterator[Candidate]:
    """Yield the credentials in a user name and a password.

    A generated user name is a secret itself, and a password beside it that is none has a fixed word:
    `TOKEN:x-oauth-basic`.
    """
    given = opens or Access()
    in_user = of_format(user, field, opens=given, **more)
    if in_user is None and names.is_generated(user) and not names.is_reference(user):
        in_user = candidate_of(kinds.KEY, user, field, opens=given, **more)
    if in_user is not None:
        yield in_user
        if not names.looks_random(password):
            return
    if len(password) < names.MIN_PASSWORD or names.is_placeholder(password) or names.is_reference(password):
        return
    known = replace(given, account=given.account or (user if in_user is None else None) or None)
    yield of_format(password, field, opens=given, **more) or candidate_of(
        kind, password, field, opens=known, **more
    )


def of_basic(encoded: str, field: str, *, kind: Kind = kinds.BASIC_AUTH, **more: Any) -> Iterator[Candidate]:
    """Yield the credentials in base64 of `user:password`; none if it is something else."""
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return
    if colon:
        yield from of_login(user, password, field, kind, **more)


def of_url(text: str, field: str, **more: Any) -> Iterator[Candidate]:
    """Yield a candidate for each URL with a password in a text."""
    for match in URL_WITH_PASSWORD.finditer(text):
        scheme, user, password, host = match[1].lower(), match[2], match[3], match[4]
        if password.lower() == user.lower() and host.partition(":")[0] in ("localhost", "127.0.0.1"):
            more = {**more, "confidence": "likely"}
        service, template = SCHEMES.get(scheme, (scheme.upper(), "http"))
        kind = replace(kinds.URL_PASSWORD, service=service, template=template)
        yield from of_login(user, password, field, kind, **{**more, "opens": Access(host=host)})


def classify(name: str, value: str, field: str | None = None, **more: Any) -> Iterator[Candidate]:
    """Yield the credentials in one setting: of a known format, as a password in a URL, or by the setting's name."""
    field = field or name
    if len(value) < names.MIN_PASSWORD:
        return
    if found := of_format(value, field, **more):
        yield found
        return
    if "-----BEGIN " in value and (found := of_pem(value, field, **more)):
        yield found
        return
    if "://" in value and "@" in value:
        in_urls = list(of_url(value, field, **more))
        if in_urls:
            yield from in_urls
            return
    if (match := _BASIC.search(value)) and (in_basic := list(of_basic(match[1], field, **more))):
        yield from in_basic
        return
    words = names.words_of(name)
    if (
        (match := _BEARER.search(value))
        and names.looks_random(match[1])
        and not names.is_placeholder(match[1])
        and not names.is_counted(match[1])
    ):
        yield candidate_of(kinds.for_name(kinds.BEARER, words), match[1], field, **more)
        return
    told = names.is_secret(name, value)
    if told == "password":
        yield candidate_of(kinds.for_name(kinds.PASSWORD, words), value.strip(), field, **_likely(more))
    elif told == "secret":
        kind = kinds.AWS_SECRET if {"secret", "aws"} <= set(words) else kinds.for_name(kinds.KEY, words)
        if {"refresh", "session", "oauth"} & set(words) and kind is not kinds.AWS_SECRET:
            kind = replace(kind, pattern=Pattern.USER_TOKEN, title="token of a signed-in user")
        yield candidate_of(kind, value.strip(), field, **_likely(more))


def _likely(more: dict[str, Any]) -> dict[str, Any]:
    return {"confidence": "likely", **more}


_PEM: Final = re.compile(
    r"-----BEGIN ((?:[A-Z0-9]+ ){0,3})PRIVATE KEY(?: BLOCK)?-----(.{16,65536}?)-----END ", re.DOTALL
)


def of_pem(text: str, field: str, **more: Any) -> Candidate | None:
    """Return a candidate for the first PEM private key of a text, with or without passphrase."""
    for found, _ in pems_in(text):
        kind, body = found
        return candidate_of(kind, body, field, **more)
    return None


def pems_in(text: str) -> Iterator[tuple[tuple[Kind, str], int]]:
    """Yield kind, base64 body and offset of each PEM private key in a text."""
    for match in _PEM.finditer(text):
        label, raw = match[1].strip(), match[2]
        # In JSON and YAML strings, line feeds may be escaped.
        lines = [line.strip() for line in raw.replace("\\n", "\n").replace("\\r", "").splitlines()]
        body = "".join(line for line in lines if line and ":" not in line)
        if (
            len(body) < 40
            or names.is_placeholder(body[:64])
            or not re.fullmatch(r"[A-Za-z0-9+/=_-]+", body[:2000])
        ):
            continue
        locked = label == "ENCRYPTED" or any("ENCRYPTED" in line for line in lines) or (
            label == "OPENSSH" and openssh_is_encrypted(body)
        )  # fmt: skip
        if label in ("OPENSSH", "DSA"):
            kind = kinds.SSH_KEY_LOCKED if locked else kinds.SSH_KEY
        elif locked:
            kind = replace(kinds.PRIVATE_KEY, id="private-key-encrypted", title="private key with passphrase",
                           pattern=Pattern.OTHER)  # fmt: skip
        else:
            kind = kinds.PRIVATE_KEY
        yield (kind, body), match.start(2)


def openssh_is_encrypted(body: str) -> bool:
    """Return whether an OpenSSH private key has a passphrase: its cipher is not `none` (PROTOCOL.key)."""
    try:
        raw = base64.b64decode(body[:64] + "=" * (-len(body[:64]) % 4))
    except (binascii.Error, ValueError):
        return False
    magic = b"openssh-key-v1\0"
    if not raw.startswith(magic):
        return False
    length = int.from_bytes(raw[len(magic) : len(magic) + 4], "big")
    return raw[len(magic) + 4 : len(magic) + 4 + length] != b"none"


def host_of(url: str) -> str | None:
    """Return the host of a URL, with its port; None if it has none."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return None
    return host[:253] or None


def _text(value: object) -> str | None:
    return value[:200] if isinstance(value, str) and value else None
