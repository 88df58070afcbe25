"""One webhook: URL, body and signature (Standard Webhooks 1.0.0).

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md. The body has the format of
incoming webhooks of Slack and of compatible products (Mattermost, Rocket.Chat).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import orjson

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.http_client import is_loopback
from ringfence.kernel.base.text import visible, visible_name
from ringfence.messages.approval import ActionRequest, ApprovalRequest
from ringfence.messages.codes import Code
from ringfence.model.lifecycle import KeyOrigin
from ringfence.model.requests.facts import RecordContext, RequestContext

_MAX_TEXT = 300
"""The longest quotation of an agent or a person. The request itself shows the whole text."""
_MAX_PERMISSIONS = 10
_WHOM = {
    "sponsor": "the agent's sponsor",
    "second_person": "a second sponsor",
    "operator": "an operator",
    "break_glass": "two operators",
}


class WebhookError(RingfenceError):
    """Raised when a configured webhook is invalid. Never quotes it."""

    code = Code.WEBHOOK_INVALID


@dataclass(frozen=True, slots=True)
class Webhook:
    """The endpoint of one person. The URL is as secret as the keys: whoever has it can write there."""

    url: str = field(repr=False)
    keys: tuple[bytes, ...] = field(repr=False)
    """Each signs: the present key, and one that is being replaced."""


def parse_webhook(text: str) -> Webhook:
    """Parse a URL and one or more secrets (`whsec_...`), separated by blanks or lines. Raises WebhookError."""
    url, *secrets = text.split()
    if not _is_allowed(url):
        raise WebhookError(
            "the URL of a webhook is https://..., or http:// to this machine, and has no user in it"
        )
    if not secrets:
        raise WebhookError(
            "after the URL of a webhook stands its secret: whsec_ and at least 24 random bytes in base64 "
            "(echo whsec_$(openssl rand -base64 32))"
        )
    return Webhook(url, tuple(map(_webhook_secret, secrets)))


def signed_headers(webhook: Webhook, id: str, at_s: int, body: bytes) -> dict[str, str]:
    """Return the headers of one attempt, at a time in seconds since 1970."""
    content = f"{id}.{at_s}.".encode() + body
    signatures = (
        base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in webhook.keys
    )
    return {
        "content-type": "application/json",
        "user-agent": "Ringfence",
        "webhook-id": id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def body_of(message: ApprovalRequest, facts: RequestContext) -> bytes:
    """Return the body about a request, from the request as the agent signed it and from verified records, as plain
    text.

    Text of others is formatted as code, so that no chat turns it into links, mentions or headings.
    """
    request = facts.request.claims
    wants = [
        f"{p.target}:{','.join(p.verbs)}:{','.join(map(visible_name, p.resources))}"
        for p in request.scope[:_MAX_PERMISSIONS]
    ]
    if len(request.scope) > _MAX_PERMISSIONS:
        wants.append(f"and {len(request.scope) - _MAX_PERMISSIONS} permissions more")
    until = utc_text(message.expires_at)
    whom = " and ".join(dict.fromkeys(_WHOM.get(one, one) for one in message.required))
    lines = [
        *(["*Break glass*: policy denies this; it can be allowed once."] if facts.break_glass else []),
        f"Agent {_code(facts.agent.state.agent_id)} asks for a credential; it needs {whom}.",
        *(f"Its task was handed on by agent {_code(one)}." for one in facts.act[1:]),
        *(f"Wants: {_code(one)}" for one in wants),
        f"For: {message.ttl_s} s, on behalf of {_code(facts.task.state.on_behalf_of)}",
        f"Task: {_code(facts.task.state.purpose)}",
        f"Its reason: {_code(request.reason)}",
        f"Until {until}. Look at it, and answer, with: {_code('ringfence approvals show ' + message.request_id)}",
    ]
    return orjson.dumps({"text": "\n".join(lines), "unfurl_links": False, "unfurl_media": False})


def body_of_action(id: str, claims: ActionRequest, ground: RecordContext) -> bytes:
    """Return the body about one waiting action, from what the gateway signed and from verified records."""
    until = utc_text(claims.exp)
    whom = _WHOM.get(claims.required, claims.required)
    lines = [
        f"Agent {_code(claims.agent_id)} waits to do one thing; it needs {whom}.",
        f"Wants: {_code(f'{claims.target_id}:{visible_name(claims.verb)}:{visible_name(claims.resource)}')}",
        f"Sends: {_code(f'{claims.method} {claims.url}')} with {claims.body_bytes} bytes",
        *_header_lines(claims),
        f"On behalf of {_code(ground.task.state.on_behalf_of)}",
        f"Task: {_code(ground.task.state.purpose)}",
        f"Until {until}. Look at it, and answer, with: {_code('ringfence approvals show ' + id)}",
    ]
    return orjson.dumps({"text": "\n".join(lines), "unfurl_links": False, "unfurl_media": False})


def body_of_key(user_id: str, origin: KeyOrigin) -> bytes:
    """Return the body about a key that was added to a user, from the verified record."""
    since = utc_text(origin.counts_from_ms / 1000)
    by = _code(origin.by) if origin.by else "the root"
    cosigned = f", co-signed by {_code(origin.endorsed_by)}" if origin.endorsed_by else ""
    end = f"ringfence user end-key {user_id} {origin.kid} --compromised --since TIME --reason unknown"
    lines = [
        f"A key was added to you, {_code(user_id)}, by {by}{cosigned}.",
        f"Its thumbprint: {_code(origin.kid)}",
        f"It counts for approvals from {since}.",
        f"If it is not yours, end it at once: {_code(end)}",
    ]
    return orjson.dumps({"text": "\n".join(lines), "unfurl_links": False, "unfurl_media": False})


def body_of_proposal(digest: str, typ: str, subject: str, author: str, ends_at_s: float) -> bytes:
    """Return the body about a change that waits for a second person: `subject` is its kind and id."""
    id = digest[:12]
    lines = [
        f"{_code(author)} proposes {_code(typ)} of {_code(subject)}. It gives more, and waits for a second person.",
        f"You may be that person, until {utc_text(ends_at_s)}.",
        f"Look at it first: {_code(f'ringfence proposal show {id}')}",
        f"To let it take effect: {_code(f'ringfence proposal second {id}')}",
    ]
    return orjson.dumps({"text": "\n".join(lines), "unfurl_links": False, "unfurl_media": False})


def body_of_receipt(
    user_id: str, kid: str, typ: str, signed_at_s: int, lines: Sequence[tuple[str, str]]
) -> bytes:
    """Return the body about a message that a passkey signed: `lines` are names and values of its claims."""
    at = utc_text(signed_at_s)
    end = f"ringfence user end-key {user_id} {kid} --compromised --since TIME --reason unknown"
    text = [
        f"Signed with your passkey {_code(kid[:8])} at {at}: {_code(typ)}",
        *(f"{name}: {_code(value)}" for name, value in lines),
        f"If that is not what you saw and signed, end the passkey, and tell an operator: {_code(end)}",
    ]
    return orjson.dumps({"text": "\n".join(text), "unfurl_links": False, "unfurl_media": False})


def _header_lines(claims: ActionRequest) -> list[str]:
    """Return the lines about headers that the question shows: values of the gateway's fixed list, names of all
    others.
    """
    seen = [f"{one.name}: {one.value}" for one in claims.headers if one.value is not None]
    names = ", ".join(one.name for one in claims.headers if one.value is None)
    return [
        *(f"Header: {_code(one)}" for one in seen),
        *([f"Headers, values not shown: {_code(names)}"] if names else []),
    ]


def _code(text: str) -> str:
    """Format text as code, with Slack's escapes. Backticks would end it."""
    shown = visible(text).replace("`", "'")
    shown = shown if len(shown) <= _MAX_TEXT else f"{shown[: _MAX_TEXT - 1]}…"
    return f"`{shown.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}`"


def _is_allowed(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        parts.port  # noqa: B018 - raises where it is none
    except ValueError:
        return False
    if not host or parts.username or parts.password:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))


def _webhook_secret(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise WebhookError("a webhook's secret is whsec_ and 24 to 64 random bytes in base64")
    return key
