"""The packed form of a signed lease record: a quarter of its size, and byte for byte the same JWS when it is unpacked.

A compact JWS is base64 of JSON with member names that are the same in every lease, and with ids in hexadecimal, some of
which follow from others. Of what issuers and revokers write, only the fields that differ are packed, each in as many
bytes as it needs. Anything else, and what would not come out the same, is deflated with a preset dictionary.

Packing costs some 25 µs, unpacking 10. Redis keeps a record for a day, and writes it to its log and to the outbox too.
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
from ringfence.model.lease_store.keys import uuid_bytes, uuid_text

FIELDS = 3
_DEFLATED, _FIELDS = b"\x01", bytes((FIELDS,))
"""The first byte of a packed record: deflated with this dictionary, or packed by fields in this layout. Another layout
gets another number; a JWS begins with a letter. Layout of `_FIELDS`: a byte for the length of the signer, the signer,
the state (what scripts read), the thumbprint of the agent's key where it is `BOUND`, the signature, all other fields,
the agent first among the texts. Scripts store less than that (`lua.STORED`)."""
_SIGNATURE_BYTES = 64
_KID_BYTES = 32
_STATE = struct.Struct(">BBIB")
"""Status, `seq`, `deadline`, flags."""
_LEVEL, _WINDOW, _MEMORY = 1, -12, 5
"""Higher levels save 25 bytes more and take twice as long; more memory takes longer to clear."""

# The most frequent strings come last: they get the shortest references. Never change it: records in Redis need it.
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
"""Separators between texts, and between the verbs, or the resources, of one permission. JSON escapes both."""
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
"""One byte for the status, one for the `seq`, four for the deadline, one for the flags (`BOUND`)."""
ACTIVE = _STATUSES.index("active")
BEFORE_AGENT = _SIGNATURE_BYTES + _FIXED.size
"""How many bytes lie between the state (or the thumbprint, if the lease is `BOUND`) and the agent's name. The name ends
with a zero byte."""
_EPOCH = struct.Struct(">I4s")
_TRACE = struct.Struct(">16s8s1s")
_PACK_ERRORS = (ValueError, LookupError, TypeError, AttributeError, struct.error, zlib.error)
"""Errors of packing by fields, or unpacking, for anything that is no record of this kind."""


def pack(jws: str) -> bytes:
    """A compact JWS in packed form. What is no JWS, or is not encoded as `b64encode` does, is returned unchanged."""
    try:
        header, payload, signature = map(b64decode, jws.split("."))
    except ValueError:
        return jws.encode()
    if len(signature) != _SIGNATURE_BYTES or b"\n" in header:
        return jws.encode()
    try:
        claims = orjson.loads(payload)
        alg, kid = _signing(header)
        signer, fields = _signer(kid, claims), _pack_fields(alg, claims)
        if _unpack_fields(signer, fields) == (header, payload):
            at = _signature_at(fields)
            return b"".join((_FIELDS, bytes((len(signer),)), signer, fields[:at], signature, fields[at:]))
    except _PACK_ERRORS:
        pass
    return b"".join((_DEFLATED, signature, _deflated(header + b"\n" + payload)))


def unpack(packed: bytes) -> bytes:
    """The compact JWS that `pack` was given. What `pack` did not make is returned unchanged, and is no JWS."""
    parts = _parts(packed)
    if parts is None:
        return packed
    header, payload = parts
    return ".".join(map(b64encode, (header, payload, _signature_of(packed)))).encode()


def _signature_of(packed: bytes) -> bytes:
    at = 1
    if packed.startswith(_FIELDS):
        at = _after_signer(packed)
        at += _signature_at(packed[at : at + STATE_BYTES])
    return packed[at : at + _SIGNATURE_BYTES]


def unverified_payload(packed: bytes) -> bytes | None:
    """The claims of a packed record, as JSON, not verified; None for anything that `pack` did not make."""
    parts = _parts(packed)
    return parts[1] if parts is not None else None


def unverified_names(packed: bytes, kind: str) -> tuple[str, ...] | None:
    """The agents, tasks, sponsors, user or target that a packed record names, not verified; None if it names none.

    A lease of a delegated task names several agents, tasks and sponsors.
    """
    try:
        if not packed.startswith(_FIELDS):
            claims = orjson.loads(unverified_payload(packed) or b"")
            above = [one[_KINDS[kind]] for one in claims.get("delegators", ()) if kind in _OF_DELEGATORS]
            return claims[_KINDS[kind]], *above
        at = _after_signer(packed)
        at += _signature_at(packed[at : at + STATE_BYTES]) + _SIGNATURE_BYTES
        *_, task, length = _FIXED.unpack_from(packed, at)
        at += _FIXED.size
        names = dict(zip(_NAMES, packed[at : at + length].decode().split(_BETWEEN), strict=False))
        return (uuid_text(task) if kind == "task" else names[_KINDS[kind]],)
    except _PACK_ERRORS:
        return None


def _parts(packed: bytes) -> tuple[bytes, bytes] | None:
    """Header and payload; None where `pack` did not make this."""
    try:
        if packed.startswith(_FIELDS):
            at = _after_signer(packed)
            fields = packed[at:]
            at_signature = _signature_at(fields)
            fields = fields[:at_signature] + fields[at_signature + _SIGNATURE_BYTES :]
            return _unpack_fields(packed[2:at], fields)
        if packed.startswith(_DEFLATED):
            header, _, payload = _inflated(packed[1 + _SIGNATURE_BYTES :]).partition(b"\n")
            return header, payload
    except _PACK_ERRORS:
        pass
    return None


def _after_signer(packed: bytes) -> int:
    """Return where the output of `_pack_fields` begins in a packed record."""
    return 2 + packed[1]


def _signature_at(fields: bytes) -> int:
    """Return where the signature is inserted into the output of `_pack_fields`."""
    return STATE_BYTES + (THUMBPRINT_BYTES if fields[STATE_BYTES - 1] & BOUND else 0)


# --- records that are packed by fields --------------------------------------------------------------------------------


def _signer(kid: bytes, claims: Any) -> bytes:
    """The key that signed a record, the trust domain, and the name of the service."""
    aud = claims["aud"]
    return kid + _BETWEEN.join((aud, claims["iss"].removeprefix(_service_id(aud, "")))).encode()


def _pack_fields(alg: int, claims: Any) -> bytes:
    """The fields that `_unpack_fields` makes header and claims of.

    The caller checks that they come out the same: if not, the record is of another kind.
    """
    deadline, cause = claims["deadline"], claims.get("cause")
    thumbprint, epoch, trace = (claims.get(name) for name in ("key_thumbprint", "epoch", "traceparent"))
    more = {name: claims[name] for name in ("grants", "break_glass") if name in claims}
    at_deadline = cause is not None and cause == _deadline_cause(deadline)
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
            uuid_bytes(claims["jti"].partition(".")[0]),
            uuid_bytes(claims["request_id"]),
            bytes.fromhex(claims["decision_digest"]),
            uuid_bytes(claims["task_id"]),
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
    yield from [claims[name] for name in _NAMES]
    for permission in claims["scope"]:
        target = permission["target"]
        yield "" if target == claims["target_id"] else target
        yield _WITHIN.join(permission["verbs"])
        yield _WITHIN.join(permission["resources"])


def _unpack_fields(signer: bytes, fields: bytes) -> tuple[bytes, bytes]:
    """Header and payload of a record, as JSON."""
    kid = signer[:_KID_BYTES]
    aud, service = signer[_KID_BYTES:].decode().split(_BETWEEN)
    status, seq, deadline, flags = _STATE.unpack_from(fields)
    at = STATE_BYTES
    thumbprint = epoch = trace = ""
    if flags & BOUND:
        thumbprint = f',"key_thumbprint":"{b64encode(fields[at : at + THUMBPRINT_BYTES])}"'
        at += THUMBPRINT_BYTES
    iat, requested_s, requested_ms, origin, request, digest, task, length = _FIXED.unpack_from(fields, at)
    at += _FIXED.size
    texts = fields[at : at + length].decode()
    agent_id, sponsor, user, target_id, backend, *scope = texts.split(_BETWEEN)
    at += length
    if flags & _IN_EPOCH:
        number, nonce = _EPOCH.unpack_from(fields, at)
        epoch = f',"epoch":"{number}.{nonce.hex()}"'
        at += _EPOCH.size
    if flags & _TRACED:
        trace_id, parent_id, trace_flags = _TRACE.unpack_from(fields, at)
        trace = f',"traceparent":"00-{trace_id.hex()}-{parent_id.hex()}-{trace_flags.hex()}"'
        at += _TRACE.size
    more = orjson.loads(_inflated(fields[at:])) if flags & _MORE else {}
    if flags & _AT_DEADLINE:
        more["cause"] = _deadline_cause(deadline)
    grants = break_glass = cause = ""
    if more:
        grants, break_glass, cause = (_json_member(name, more) for name in ("grants", "break_glass", "cause"))
    permissions = ",".join(
        f'{{"target":"{scope[n] or target_id}","verbs":["{_quoted(scope[n + 1])}"],'
        f'"resources":["{_quoted(scope[n + 2])}"]}}'
        for n in range(0, len(scope), 3)
    )
    request_id = uuid_text(request)
    payload = (
        f'{{"iss":"{_service_id(aud, service)}","aud":"{aud}","iat":{iat},"jti":"{uuid_text(origin)}.{seq}",'
        f'"lease_id":"{lease_id(request_id)}","seq":{seq},"status":"{_STATUSES[status]}","request_id":"{request_id}",'
        f'"decision_id":"{derived_id("decision", request_id, "allowed")}","decision_digest":"{digest.hex()}",'
        f'"agent_id":"{agent_id}","act":["{agent_id}"],"sponsor":"{sponsor}","on_behalf_of":"{user}",'
        f'"task_id":"{uuid_text(task)}","target_id":"{target_id}","backend":"{backend}",'
        f'"delivery":"{_DELIVERIES[bool(flags & _GATEWAY)]}","scope":[{permissions}],'
        f'"requested_at_ms":{requested_s * 1000 + requested_ms},"deadline":{deadline}'
        f"{grants}{thumbprint}{break_glass}{cause}{epoch}{trace}}}"
    )
    return _header(flags & _EDDSA, kid), payload.encode()


@lru_cache(maxsize=256)
def _signing(header: bytes) -> tuple[int, bytes]:
    """Algorithm and `kid`."""
    members = orjson.loads(header)
    return _ALGORITHMS.index(members["alg"]), b64decode(members["kid"])


@lru_cache(maxsize=256)
def _header(alg: int, kid: bytes) -> bytes:
    return f'{{"alg":"{_ALGORITHMS[alg]}","kid":"{b64encode(kid)}","typ":"{typ_header(Lease)}"}}'.encode()


def _quoted(texts: str) -> str:
    return texts.replace(_WITHIN, '","')


def _service_id(aud: str, name: str) -> str:
    return f"spiffe://{aud}/service/{name}"


def _deadline_cause(deadline: int) -> dict[str, Any]:
    return {"kind": "deadline", "at_ms": deadline * 1000}


def _json_member(name: str, more: dict[str, Any]) -> str:
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
