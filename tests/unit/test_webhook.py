"""What a webhook says and how it is signed; what is none."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any, cast

import orjson
import pytest

from ringfence.messages.approval import ApprovalRequest
from ringfence.messages.registry import TaskRecord
from ringfence.policy.notifications.webhook import (
    Webhook,
    WebhookError,
    body_of,
    parse_webhook,
    signed_headers,
)
from tests.support.world import scope
from tests.unit.test_policy_domain import entry, facts
from tests.unit.test_questions import HOSTILE
from tools.schemas.examples import EXAMPLES

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
URL = "https://hooks.slack.com/services/T000/B000/XXXX"
ASKED = cast(ApprovalRequest, EXAMPLES[ApprovalRequest])


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # From the tests of that project's own libraries.
    webhook = parse_webhook(f"{URL} whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers(webhook, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert headers["webhook-timestamp"] == "1614265330"
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_while_a_secret_is_replaced_both_sign() -> None:
    other = "whsec_" + base64.b64encode(b"o" * 32).decode()
    both = parse_webhook(f"{URL}\n{SECRET}\n{other}\n")
    alone = [parse_webhook(f"{URL} {secret}") for secret in (SECRET, other)]
    signature = [signed_headers(one, "id", 1, b"{}")["webhook-signature"] for one in (both, *alone)]
    assert signature[0] == f"{signature[1]} {signature[2]}"


@pytest.mark.parametrize(
    "url",
    [
        URL, "https://10.0.0.1:8443/x?y=z", "http://127.0.0.1:8080/x", "http://[::1]/x", "http://localhost/x",
    ],
)  # fmt: skip
def test_https_or_loopback_webhook_is_accepted(url: str) -> None:
    assert parse_webhook(f"{url} {SECRET}").url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.slack.com/x", "http://10.0.0.1/x", "http://127.0.0.1.evil.example/x", "ftp://127.0.0.1/x",
        "https://user:pass@hooks.slack.com/x", "https:///x", "https://h:99999/x", "file:///etc/passwd", "hooks",
        "//h/x", "http://169.254.169.254/latest", "http://localhost.evil.example/",
    ],
)  # fmt: skip
def test_unsafe_webhook_is_rejected_without_its_secrets(url: str) -> None:
    with pytest.raises(WebhookError) as raised:
        parse_webhook(f"{url} {SECRET}")
    assert "pass" not in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "A" * 88, SECRET.removeprefix("whsec_"), "whsec_!!!!" * 8],
)
def test_malformed_webhook_secret_is_rejected(secret: str) -> None:
    with pytest.raises(WebhookError) as raised:
        parse_webhook(f"{URL} {secret}")
    assert URL not in str(raised.value)


def test_neither_url_nor_secret_is_told_by_accident() -> None:
    assert "XXXX" not in repr(Webhook(URL, (b"k" * 32,)))
    assert "kkk" not in repr(Webhook(URL, (b"k" * 32,)))


def text_of(**changes: Any) -> str:
    asked = ASKED.model_copy(update={"required": ("sponsor", "operator")})
    found = facts(scope=scope("staging", ["deploy"], ["env/staging/*"]), **changes)
    document = orjson.loads(body_of(asked, found))
    assert document["unfurl_links"] is document["unfurl_media"] is False
    return str(document["text"])


def test_webhook_text_names_the_request_and_how_to_answer() -> None:
    text = text_of(reason="deploy build 421")
    for part in (
        "`deploy-bot`", "the agent's sponsor and an operator", "`staging:deploy:env/staging/*`", "`maria`", "300 s",
        "`deploy the staging build`", "`deploy build 421`", f"`ringfence approvals show {ASKED.request_id}`",
    ):  # fmt: skip
        assert part in text


def test_break_glass_is_told_first() -> None:
    asked = ASKED.model_copy(update={"required": ("break_glass", "break_glass")})
    lines = orjson.loads(body_of(asked, facts(break_glass=True)))["text"].split("\n")
    assert lines[0].startswith("*Break glass*")
    assert lines[1].endswith("it needs two operators.")


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE, "` *all is well* <https://evil.example|approve here> `", "<!channel> <@U1> & co",
        "```\n# heading\n```",
    ],
    ids=str,
)  # fmt: skip
def test_hostile_text_stays_inside_code_marks(text: str) -> None:
    lines, plain = text_of(reason=text).split("\n"), text_of(reason="plain").split("\n")
    assert len(lines) == len(plain)
    line = next(line for line in lines if line.startswith("Its reason: "))
    said = line.removeprefix("Its reason: ")
    assert said.startswith("`")
    assert said.endswith("`")
    assert "`" not in said[1:-1]
    assert not set("<>\r\x1b\u202e") & set(said)


def test_long_webhook_text_is_truncated() -> None:
    found = replace(facts(), task=entry(TaskRecord, purpose="y" * 2000))
    many = tuple(p for n in range(64) for p in scope("staging", ["deploy"], [f"{n}/{'z' * 500}"]))
    found = replace(found, request=facts(reason="x" * 2000, scope=many).request)
    body = body_of(ASKED, found)
    assert len(body) < 8000
    assert "and 54 permissions more" in orjson.loads(body)["text"]
