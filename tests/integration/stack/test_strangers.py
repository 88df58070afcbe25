"""Tools that know nothing of our code: a request by hand, kcat, plain consumers."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from joserfc import jws
from joserfc.jwk import ECKey
from jsonschema.validators import Draft202012Validator

from ringfence.kernel.tracing.api import trace_id
from ringfence.messages.base import Topic
from ringfence.messages.topics import (
    ALL,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    AUDIT,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    LEASE,
)
from tests.support.stack import RunningStack, first_pending

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/no-sdk/request_by_hand.py"
OVER_HTTP = ROOT / "examples/no-sdk/request_over_http.py"
LEASE_ALLOWED = r"allowed: lease [0-9a-f-]{36}\n"
WITH_CURL = ROOT / "examples/no-sdk/request_with_curl.py"


async def run(*argv: str, env: dict[str, str]) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *argv, env={**os.environ, **env}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 90)
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, out.decode(), err.decode()


async def ask_by_hand(
    realm: RunningStack, folder: Path, verb: str, resource: str, example: Path = EXAMPLE
) -> dict[str, object]:
    key_file = folder / "bot.json"
    if not key_file.exists():
        realm.key("agent", realm.agent).save(key_file)
    status, out, err = await run(
        sys.executable, str(example), str(key_file), realm.task, realm.target, verb, resource,
        env={**realm.stack.environment(), "RINGFENCE_DOOR": realm.stack.door or ""},
    )  # fmt: skip
    assert status == 0, err
    answer: dict[str, object] = json.loads(out)
    return answer


async def test_a_request_written_by_hand_is_served(realm: RunningStack, tmp_path: Path) -> None:
    answer = await ask_by_hand(realm, tmp_path, "read", "env/staging/web")
    assert answer["outcome"] == "allowed"
    credential = answer["credential"]
    assert isinstance(credential, dict)
    assert credential["kind"] == "jwt"


async def test_a_request_by_hand_beyond_the_rule_is_told_why(realm: RunningStack, tmp_path: Path) -> None:
    answer = await ask_by_hand(realm, tmp_path, "write", "env/production/web")
    assert answer["outcome"] == "denied"
    assert answer["credential"] is None
    assert any(reason["code"] == "beyond_scope" for reason in answer["reasons"])  # type: ignore[attr-defined]


async def test_a_request_over_http_waits_for_its_approval(realm: RunningStack, tmp_path: Path) -> None:
    """A program that has joserfc and httpx, the key of an agent and the pinned root: and no Kafka."""
    async with realm.sponsor() as sam:
        asked = asyncio.create_task(ask_by_hand(realm, tmp_path, "write", "env/staging/web", OVER_HTTP))
        await sam.approve(await first_pending(sam))
        answer = await asked
    assert answer["outcome"] == "allowed"
    credential = answer["credential"]
    assert isinstance(credential, dict)
    assert credential["kind"] == "jwt"
    assert "value" not in credential


async def test_a_request_over_http_beyond_the_rule_is_told_why(realm: RunningStack, tmp_path: Path) -> None:
    answer = await ask_by_hand(realm, tmp_path, "write", "env/production/web", OVER_HTTP)
    assert answer["outcome"] == "denied"
    assert any(reason["code"] == "beyond_scope" for reason in answer["reasons"])  # type: ignore[attr-defined]


NO_SDK = ROOT / "examples/no-sdk"


async def built(language: str, folder: Path) -> list[str]:
    """The command that runs the example in a language, built with its pinned library."""
    if language == "go":
        words = ("go", "build", "-C", str(NO_SDK / "go"), "-o", str(folder / "request"), ".")
        command = [str(folder / "request")]
    else:
        for name in ("package.json", "request.mjs"):
            (folder / name).write_text((NO_SDK / "node" / name).read_text())
        words = ("npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund")
        command = ["node", str(folder / "request.mjs")]
    status, out, err = await run(*words, env={"npm_config_update_notifier": "false"})
    assert status == 0, out + err
    return command


@pytest.mark.tools
@pytest.mark.timeout(300)
@pytest.mark.parametrize("language", ["node", "go"])
async def test_request_in_another_language_is_approved_denied_and_verified(
    realm: RunningStack, tmp_path: Path, language: str
) -> None:
    command = await built(language, tmp_path)
    key_file = tmp_path / "bot.json"
    realm.key("agent", realm.agent).save(key_file)
    environment = {**realm.stack.environment(), "RINGFENCE_DOOR": realm.stack.door or ""}

    async def ask(verb: str, resource: str, **env: str) -> tuple[int, str, str]:
        words = (str(key_file), realm.task, realm.target, verb, resource)
        return await run(*command, *words, env={**environment, **env})

    async with realm.sponsor() as sam:
        asked = asyncio.create_task(ask("write", "env/staging/web"))
        await sam.approve(await first_pending(sam))
        status, out, err = await asked
    assert status == 0, err
    answer = json.loads(out)
    assert (answer["outcome"], answer["credential"]["kind"]) == ("allowed", "jwt")
    assert "value" not in answer["credential"]
    assert "approval_required: waiting" in err
    status, out, err = await ask("write", "env/production/web")
    assert status == 0, err
    assert "beyond_scope" in {reason["code"] for reason in json.loads(out)["reasons"]}
    status, out, err = await ask("read", "env/staging/web", RINGFENCE_TRUST_ROOT="A" * 43)
    assert (status, out) == (1, "")
    assert "another root signed the trust bundle" in err


def test_the_example_with_curl_has_forty_lines() -> None:
    lines = [line.strip() for line in WITH_CURL.read_text().splitlines()[1:]]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 40
    assert "import ringfence" not in WITH_CURL.read_text()


@pytest.mark.tools
async def test_a_request_with_curl_goes_through_the_socket_of_its_task(
    realm: RunningStack, tmp_path: Path
) -> None:
    socket = realm.stack.sockets / f"{realm.task}.sock"
    async with realm.as_agent() as agent:  # the first lease for gateways opens the socket
        await agent.request(
            task=realm.task, target=realm.target, verbs=["read"], resources=["env/staging/web"], reason="to read",
            delivery="gateway",
        )  # fmt: skip
    async with asyncio.timeout(60):
        while not socket.exists():
            await asyncio.sleep(0.05)
    realm.key("agent", realm.agent).save(tmp_path / "bot.json")
    environment = {
        **realm.stack.environment(),
        "RINGFENCE_DOOR": f"unix:{socket}",
        "RINGFENCE_IDENTITY": str(tmp_path / "bot.json"),
    }

    async def ask(verb: str, resource: str) -> tuple[int, str, str]:
        words = (str(WITH_CURL), realm.task, realm.target, verb, resource)
        return await run(sys.executable, *words, env=environment)

    assert re.fullmatch(LEASE_ALLOWED, (await ask("read", "env/staging/web"))[1])
    status, _, err = await ask("write", "env/production/web")
    assert (status, "beyond_scope" in err) == (1, True), err
    async with realm.sponsor() as sam:
        asked = asyncio.create_task(ask("write", "env/staging/web"))
        await sam.approve(await first_pending(sam))
        assert re.fullmatch(LEASE_ALLOWED, (await asked)[1])


async def test_a_request_by_hand_passes_over_what_is_for_others(realm: RunningStack, tmp_path: Path) -> None:
    """Envelopes for gateways stand on the topic of replies, and whatever anybody with write access puts there."""
    topic = CREDENTIAL_REPLY.name(realm.settings.topic_prefix)
    async with realm.sponsor() as sam, realm.as_agent() as agent:
        asked = asyncio.create_task(ask_by_hand(realm, tmp_path, "write", "env/staging/web"))
        pending = await first_pending(sam)
        await agent.request(
            task=realm.task, target=realm.target, verbs=["read"], resources=["env/staging/web"], reason="to read",
            delivery="gateway",
        )  # fmt: skip
        head = base64.urlsafe_b64encode(json.dumps({"kid": pending.request_id}).encode()).rstrip(b"=")
        producer = AIOKafkaProducer(bootstrap_servers=realm.settings.kafka)
        await producer.start()
        try:
            for value in (None, b"", b"a", b"\xff.a", b"W10.a.b.c.d", head, head + b".a.b.c.d"):
                await producer.send_and_wait(topic, value, key=realm.agent.encode())
        finally:
            await producer.stop()
        await sam.approve(pending)
        answer = await asked
    assert answer["credential"]


async def test_a_request_by_hand_is_one_trace_though_it_named_none(
    realm: RunningStack, tmp_path: Path
) -> None:
    async with realm.sponsor() as sam, realm.seen(*ON_THE_WAY, AUDIT) as seen:
        asked = asyncio.create_task(ask_by_hand(realm, tmp_path, "write", "env/staging/web"))
        await sam.approve(await first_pending(sam))
        answer = await asked
        assert answer["credential"]

        def told() -> list[dict[str, Any]]:
            events = [json.loads(record.value)["unmapped"] for record in seen.of(AUDIT)]
            mine = [one for one in events if one.get("request") == answer["request_id"]]
            return mine if len(mine) >= len(STORY) else []

        events = await seen.until(told, "its story")
    traces = {event["trace_id"] for event in events}
    assert len(traces) == 1
    for topic, count in ON_THE_WAY.items():
        sent = [record for record in seen.of(topic) if trace_id(record.traceparent) in traces]
        assert len(sent) == count, topic.what


STORY = (
    "credential.requested", "approval.required", "approval.requested", "reply.sent", "approval.given",
    "request.allowed", "credential.issued", "reply.sent",
)  # fmt: skip
ON_THE_WAY: dict[Topic[Any], int] = {
    CREDENTIAL_REQUEST: 1, CREDENTIAL_DECISION: 2, APPROVAL_REQUEST: 1, APPROVAL_RESPONSE: 1, LEASE: 1,
    CREDENTIAL_REPLY: 2,
}  # fmt: skip
"""So many records of it are on each topic."""


ASYNCAPI: dict[str, Any] = yaml.safe_load((ROOT / "schemas/asyncapi.yaml").read_text())


def published_schema(
    topic: str, value: bytes, schemas: Mapping[str, Draft202012Validator]
) -> tuple[str, Any]:
    """The name of the schema that a record must follow, and what must follow it: a JWS says so in its `typ`.

    Of several kinds of JSON on a topic it has to follow one.
    """
    if value.startswith(b"{"):
        known, body = ASYNCAPI["components"]["messages"], json.loads(value)
        names = [
            name
            for name in ASYNCAPI["channels"][topic]["messages"]
            if known[name]["contentType"] == "application/json"
        ]
        return next((name for name in names if schemas[name].is_valid(body)), names[0]), body
    head, payload, _ = (base64.urlsafe_b64decode(part + b"==") for part in value.split(b"."))
    return json.loads(head)["typ"].removeprefix("ringfence.").removesuffix("+jwt"), json.loads(payload)


async def test_a_plain_consumer_finds_every_message_as_the_schemas_say(realm: RunningStack) -> None:
    prefix, ours = realm.settings.topic_prefix, f"spiffe://{realm.settings.trust_domain}/".encode()
    async with realm.as_agent() as agent, realm.sponsor() as sam:
        asked = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/web"], reason="to write",
                timeout_s=30,
            )
        )  # fmt: skip
        await sam.approve(await first_pending(sam))
        credential = await asked
        await agent.release(credential)
    schemas = {
        file.name.removesuffix(".schema.json"): Draft202012Validator(json.loads(file.read_text()))
        for file in (ROOT / "schemas").glob("*.schema.json")
    }
    topics = [f"{prefix}.{topic.what}.v1" for topic in ALL if topic.encoding != "jwe"]
    consumer = AIOKafkaConsumer(
        *topics,
        bootstrap_servers=realm.settings.kafka,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    seen: set[str] = set()
    bundle: dict[str, Any] = {}
    asked_with: list[tuple[bytes, bytes]] = []
    await consumer.start()
    try:
        async with asyncio.timeout(60):
            async for record in consumer:
                headers = dict(record.headers)
                # Other tests attack the same topics: what they put there is not ours.
                if not headers.get("ce_source", b"").startswith(ours) or not record.value:
                    continue
                name, body = published_schema(
                    record.topic.removeprefix(f"{prefix}.").removesuffix(".v1"), record.value, schemas
                )
                schemas[name].validate(body)
                if name == "trust.bundle":
                    bundle = body
                if name == "approval.request":
                    asked_with.append((record.value, headers["signature"]))
                assert headers["content-type"] == b"application/" + (
                    b"json" if record.value[:1] == b"{" else b"jose"
                )
                if name != "audit-event" or body["unmapped"].get("lease") == credential.lease_id:
                    seen.add(name)
                if seen >= EVERY_FLOW:
                    break
    finally:
        await consumer.stop()
    keys = {k["kid"]: k["jwk"] for s in bundle["services"] if "policy" in s["roles"] for k in s["keys"]}
    for (
        value,
        signature,
    ) in asked_with:  # plain JSON, and signed: the header is the JWS without what stands there
        kid = json.loads(base64.urlsafe_b64decode(signature.split(b".")[0] + b"=="))["kid"]
        key = ECKey.import_key(keys[kid])
        jws.deserialize_compact(signature.decode(), key, payload=value, algorithms=["ES256"])


EVERY_FLOW = {
    "trust.bundle", "user.set", "agent.register", "target.set", "task.assign", "user", "agent", "target", "task",
    "credential.request", "credential.decision", "approval.request", "approval", "lease", "revocation.request",
    "service.event", "heartbeat", "audit-event",
}  # fmt: skip
"""What a credential that was approved and given back leaves on the topics."""


@pytest.mark.tools
async def test_kcat_reads_the_audit_topic(realm: RunningStack) -> None:
    kcat = shutil.which("kcat")
    assert kcat, "kcat is not installed; on Debian: apt-get install kcat"
    async with realm.as_agent() as agent:
        await realm.read(agent)
    topic = f"{realm.settings.topic_prefix}.audit.v1"
    status, out, err = await run(
        kcat, "-C", "-b", realm.settings.kafka, "-t", topic, "-o", "beginning", "-c", "3", "-e", "-q", env={}
    )
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 3
    assert all(line["metadata"]["product"]["name"] == "Ringfence" for line in lines)
