"""Signed records as they stand in Redis: a quarter of their size, and byte for byte the same when they are read.

A compact JWS is base64 of JSON with names that are the same in every lease, and with ids in hexadecimal, some of which
follow from others. What issuers and revokers write is taken apart: what differs is kept, in as many bytes as it has.
Anything else, and what would not be the same again, is deflated. It costs some 25 µs to write a record and 10 to read
it; Redis keeps it for a day, and writes it to its log and to the outbox as well.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson

from ringfence.kernel.base.ids import derived_id, lease_id
from ringfence.kernel.crypto.jws import MAX_JWS_BYTES
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.messages.base import typ_header
from ringfence.messages.lease import Lease
from ringfence.model.lease_store.keys import packed, unpacked

_DEFLATED, _APART = b"\x01", b"\x03"
"""Begin what is deflated with this dictionary, and what is taken apart in this way; others have other numbers. A JWS
begins with a letter. After `_APART` comes who signed it, with its length in a byte before; then what scripts look at,
the thumbprint of the agent's key, the signature, and all the rest, where the agent comes first among the texts. What is
the same in many records scripts leave out (`scripts.KEPT`)."""
_SIGNATURE_BYTES = 64
_KID_BYTES = 32
_STATE = struct.Struct(">BBIB")
"""Status, `seq`, `deadline`, flags."""
_LEVEL, _WINDOW, _MEMORY = 1, -12, 5
"""Higher levels save 25 bytes more and take twice as long; clearing more memory than that takes longer still."""

# What comes last is found with the shortest references. Never changed: what is in Redis was packed with it.
_DICTIONARY = (
    b'"minting","released","aborted","ending","revoked","active"'
    b'"cause":{"kind":"release","kind":"task_ended","kind":"agent_suspended","kind":"user_disabled","kind":"target_removed"'
    b'"kind":"scope_narrowed","kind":"revocation","at_ms":179,"by":"spiffe:///user/","by":"spiffe:///agent/","ref":"'
    b'","reason":"beyond the ceiling of agent as it is now"}'
    b'{"alg":"EdDSA","kid":"{"alg":"ES256","kid":"","typ":"ringfence.lease+jwt"}\n'
    b'{"iss":"spiffe:///service/revoker","aud":"","iss":"spiffe:///service/issuer","aud":"","iat":179,"jti":"-5.1",'
    b'"lease_id":"-5","seq":2,"status":"expired","seq":1,"status":"active","request_id":"-5","decision_id":"-5'
    b'","decision_digest":"","agent_id":"","act":[""],"sponsor":"","on_behalf_of":"","task_id":"-5","target_id":"'
    b'","backend":"jwt","delivery":"gateway","delivery":"agent","scope":[{"target":"","verbs":["read"],"resources":["'
    b'/**"]}],"requested_at_ms":179,"deadline":179,"key_thumbprint":"","cause":{"kind":"deadline","at_ms":179000},'
    b'"epoch":"1.","traceparent":"00--01"}'
)
_FRESH = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW, _MEMORY, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY)

_FIXED = struct.Struct(">IIH16s16s32s16sH")
"""`iat`, `requested_at_ms` in s and ms, ids of origin and request, digest of the decision, id of the task, length of
the texts."""
_BETWEEN, _WITHIN = "\0", "\1"
"""Between texts, and between the verbs, or the resources, of one permission. JSON would write both in another way."""
_STATUSES = ("minting", "active", "ending", "released", "revoked", "expired", "aborted")
_ALGORITHMS = ("ES256", "EdDSA")
_DELIVERIES = ("agent", "gateway")
_NAMES = ("agent_id", "sponsor", "on_behalf_of", "target_id", "backend")
_KINDS = {
    "agent": "agent_id", "task": "task_id", "sponsor": "sponsor", "user": "on_behalf_of", "target": "target_id"
}  # fmt: skip
_OF_DELEGATORS = ("agent", "task", "sponsor")
_EDDSA, _GATEWAY, BOUND, _AT_DEADLINE, _IN_EPOCH, _TRACED, _MORE = (1 << n for n in range(7))
THUMBPRINT_BYTES = 32
STATE_BYTES = _STATE.size
"""The status comes first in them, then a byte for the `seq`, four for the deadline, and the flags (`BOUND`)."""
ACTIVE = _STATUSES.index("active")
BEFORE_AGENT = _SIGNATURE_BYTES + _FIXED.size
"""So many bytes lie between the state, or the thumbprint that there is where it is `BOUND`, and the agent's name, which
ends with a zero."""
_EPOCH = struct.Struct(">I4s")
_TRACE = struct.Struct(">16s8s1s")
_UNFIT = (ValueError, LookupError, TypeError, AttributeError, struct.error, zlib.error)
"""What taking something apart raises that is no record of this kind."""


def condensed(jws: str) -> bytes:
    """A compact JWS, smaller. What is none, or is written in another way than JWS are, stays as it is."""
    try:
        header, payload, signature = map(b64decode, jws.split("."))
    except ValueError:
        return jws.encode()
    if len(signature) != _SIGNATURE_BYTES or b"\n" in header:
        return jws.encode()
    try:
        claims = orjson.loads(payload)
        alg, kid = _signing(header)
        signer, apart = _signer(kid, claims), _taken_apart(alg, claims)
        if _put_together(signer, apart) == (header, payload):
            at = _signature_at(apart)
            return b"".join((_APART, bytes((len(signer),)), signer, apart[:at], signature, apart[at:]))
    except _UNFIT:
        pass
    return b"".join((_DEFLATED, signature, _deflated(header + b"\n" + payload)))


def expanded(stored: bytes) -> bytes:
    """The compact JWS that `condensed` was given. What `condensed` did not write stays as it is, and is no JWS."""
    parts = _parts(stored)
    if parts is None:
        return stored
    header, payload = parts
    return ".".join(map(b64encode, (header, payload, _signature_of(stored)))).encode()


def _signature_of(stored: bytes) -> bytes:
    """The signature in what `condensed` wrote of a JWS."""
    at = 1
    if stored.startswith(_APART):
        at = _after_signer(stored)
        at += _signature_at(stored[at : at + STATE_BYTES])
    return stored[at : at + _SIGNATURE_BYTES]


def unverified_payload(stored: bytes) -> bytes | None:
    """The claims in what `condensed` wrote, as JSON. For records that were verified before; None for anything else."""
    parts = _parts(stored)
    return parts[1] if parts is not None else None


def unverified_names(stored: bytes, kind: str) -> tuple[str, ...] | None:
    """The agents, tasks, sponsors, user or target of a lease, by what `condensed` wrote; None where that does not say.

    There are several of those where the task was handed on.
    """
    try:
        if not stored.startswith(_APART):
            claims = orjson.loads(unverified_payload(stored) or b"")
            above = [one[_KINDS[kind]] for one in claims.get("delegators", ()) if kind in _OF_DELEGATORS]
            return claims[_KINDS[kind]], *above
        at = _after_signer(stored)
        at += _signature_at(stored[at : at + STATE_BYTES]) + _SIGNATURE_BYTES
        *_, task, length = _FIXED.unpack_from(stored, at)
        at += _FIXED.size
        names = dict(zip(_NAMES, stored[at : at + length].decode().split(_BETWEEN), strict=False))
        return (unpacked(task) if kind == "task" else names[_KINDS[kind]],)
    except _UNFIT:
        return None


def _parts(stored: bytes) -> tuple[bytes, bytes] | None:
    """Header and payload; None where `condensed` did not write them."""
    try:
        if stored.startswith(_APART):
            at = _after_signer(stored)
            apart = stored[at:]
            at_signature = _signature_at(apart)
            apart = apart[:at_signature] + apart[at_signature + _SIGNATURE_BYTES :]
            return _put_together(stored[2:at], apart)
        if stored.startswith(_DEFLATED):
            header, _, payload = _inflated(stored[1 + _SIGNATURE_BYTES :]).partition(b"\n")
            return header, payload
    except _UNFIT:
        pass
    return None


def _after_signer(stored: bytes) -> int:
    """Where what `_taken_apart` made begins."""
    return 2 + stored[1]


def _signature_at(apart: bytes) -> int:
    """Where the signature has its place in what `_taken_apart` made."""
    return STATE_BYTES + (THUMBPRINT_BYTES if apart[STATE_BYTES - 1] & BOUND else 0)


# --- records that are taken apart -------------------------------------------------------------------------------------


def _signer(kid: bytes, claims: Any) -> bytes:
    """The key that signed a record, the trust domain, and the name of the service."""
    aud = claims["aud"]
    return kid + _BETWEEN.join((aud, claims["iss"].removeprefix(_service(aud, "")))).encode()


def _taken_apart(alg: int, claims: Any) -> bytes:
    """What `_put_together` makes the same header and claims of. If it does not: they are of another kind."""
    deadline, cause = claims["deadline"], claims.get("cause")
    thumbprint, epoch, trace = (claims.get(name) for name in ("key_thumbprint", "epoch", "traceparent"))
    more = {name: claims[name] for name in ("grants", "break_glass") if name in claims}
    at_deadline = cause is not None and cause == _at_deadline(deadline)
    if cause is not None and not at_deadline:
        more["cause"] = cause
    flags = (
        _EDDSA * alg
        | _GATEWAY * _DELIVERIES.index(claims["delivery"])
        | BOUND * (thumbprint is not None)
        | _AT_DEADLINE * at_deadline
        | _IN_EPOCH * (epoch is not None)
        | _TRACED * (trace is not None)
        | _MORE * bool(more)
    )
    texts = _BETWEEN.join(_texts(claims)).encode()
    parts = [
        _STATE.pack(_STATUSES.index(claims["status"]), claims["seq"], deadline, flags),
        b64decode(thumbprint) if thumbprint is not None else b"",
        _FIXED.pack(
            claims["iat"],
            *divmod(claims["requested_at_ms"], 1000),
            packed(claims["jti"].partition(".")[0]),
            packed(claims["request_id"]),
            bytes.fromhex(claims["decision_digest"]),
            packed(claims["task_id"]),
            len(texts),
        ),
        texts,
    ]
    if epoch is not None:
        number, _, nonce = epoch.partition(".")
        parts.append(_EPOCH.pack(int(number), bytes.fromhex(nonce)))
    if trace is not None:
        parts.append(_TRACE.pack(*map(bytes.fromhex, trace.split("-")[1:])))
    if more:
        parts.append(_deflated(orjson.dumps(more)))
    return b"".join(parts)


def _texts(claims: Any) -> Iterator[str]:
    """The names in a record, and its scope."""
    yield from [claims[name] for name in _NAMES]
    for permission in claims["scope"]:
        target = permission["target"]
        yield "" if target == claims["target_id"] else target
        yield _WITHIN.join(permission["verbs"])
        yield _WITHIN.join(permission["resources"])


def _put_together(signer: bytes, apart: bytes) -> tuple[bytes, bytes]:
    """Header and payload."""
    kid = signer[:_KID_BYTES]
    aud, service = signer[_KID_BYTES:].decode().split(_BETWEEN)
    status, seq, deadline, flags = _STATE.unpack_from(apart)
    at = STATE_BYTES
    thumbprint = epoch = trace = ""
    if flags & BOUND:
        thumbprint = f',"key_thumbprint":"{b64encode(apart[at : at + THUMBPRINT_BYTES])}"'
        at += THUMBPRINT_BYTES
    iat, requested_s, requested_ms, origin, request, digest, task, length = _FIXED.unpack_from(apart, at)
    at += _FIXED.size
    texts = apart[at : at + length].decode()
    agent_id, sponsor, user, target_id, backend, *scope = texts.split(_BETWEEN)
    at += length
    if flags & _IN_EPOCH:
        number, nonce = _EPOCH.unpack_from(apart, at)
        epoch = f',"epoch":"{number}.{nonce.hex()}"'
        at += _EPOCH.size
    if flags & _TRACED:
        trace_id, parent_id, trace_flags = _TRACE.unpack_from(apart, at)
        trace = f',"traceparent":"00-{trace_id.hex()}-{parent_id.hex()}-{trace_flags.hex()}"'
        at += _TRACE.size
    more = orjson.loads(_inflated(apart[at:])) if flags & _MORE else {}
    if flags & _AT_DEADLINE:
        more["cause"] = _at_deadline(deadline)
    grants = break_glass = cause = ""
    if more:
        grants, break_glass, cause = (_member(name, more) for name in ("grants", "break_glass", "cause"))
    permissions = ",".join(
        f'{{"target":"{scope[n] or target_id}","verbs":["{_several(scope[n + 1])}"],'
        f'"resources":["{_several(scope[n + 2])}"]}}'
        for n in range(0, len(scope), 3)
    )
    request_id = unpacked(request)
    payload = (
        f'{{"iss":"{_service(aud, service)}","aud":"{aud}","iat":{iat},"jti":"{unpacked(origin)}.{seq}",'
        f'"lease_id":"{lease_id(request_id)}","seq":{seq},"status":"{_STATUSES[status]}","request_id":"{request_id}",'
        f'"decision_id":"{derived_id("decision", request_id, "allowed")}","decision_digest":"{digest.hex()}",'
        f'"agent_id":"{agent_id}","act":["{agent_id}"],"sponsor":"{sponsor}","on_behalf_of":"{user}",'
        f'"task_id":"{unpacked(task)}","target_id":"{target_id}","backend":"{backend}",'
        f'"delivery":"{_DELIVERIES[bool(flags & _GATEWAY)]}","scope":[{permissions}],'
        f'"requested_at_ms":{requested_s * 1000 + requested_ms},"deadline":{deadline}'
        f"{grants}{thumbprint}{break_glass}{cause}{epoch}{trace}}}"
    )
    return _header(flags & _EDDSA, kid), payload.encode()


@lru_cache(maxsize=256)
def _signing(header: bytes) -> tuple[int, bytes]:
    """Algorithm and `kid`."""
    fields = orjson.loads(header)
    return _ALGORITHMS.index(fields["alg"]), b64decode(fields["kid"])


@lru_cache(maxsize=256)
def _header(alg: int, kid: bytes) -> bytes:
    return f'{{"alg":"{_ALGORITHMS[alg]}","kid":"{b64encode(kid)}","typ":"{typ_header(Lease)}"}}'.encode()


def _several(texts: str) -> str:
    return texts.replace(_WITHIN, '","')


def _service(aud: str, name: str) -> str:
    return f"spiffe://{aud}/service/{name}"


def _at_deadline(deadline: int) -> dict[str, Any]:
    return {"kind": "deadline", "at_ms": deadline * 1000}


def _member(name: str, more: dict[str, Any]) -> str:
    return f',"{name}":{orjson.dumps(more[name]).decode()}' if name in more else ""


# --- all others -------------------------------------------------------------------------------------------------------


def _deflated(text: bytes) -> bytes:
    deflating = _FRESH.copy()
    return deflating.compress(text) + deflating.flush()


def _inflated(data: bytes) -> bytes:
    """Raises ValueError or zlib.error where `_deflated` did not write it."""
    inflating = zlib.decompressobj(_WINDOW, _DICTIONARY)
    text = inflating.decompress(data, MAX_JWS_BYTES)
    if not inflating.eof:
        raise ValueError("not deflated whole")
    return text
