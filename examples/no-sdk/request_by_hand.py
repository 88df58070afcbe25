"""Ask Ringfence for a credential without its SDK: PyJWT, joserfc and aiokafka are all it takes.

    python examples/no-sdk/request_by_hand.py KEY_FILE TASK_ID TARGET VERB RESOURCE

Reads RINGFENCE_KAFKA, RINGFENCE_TRUST_DOMAIN and RINGFENCE_TOPIC_PREFIX. Prints what the reply holds, without the
credential itself. To keep it short it does not verify the signatures in the reply, as whoever uses the credential has
to: anybody can seal to a reply key. The SDK does.
"""

import asyncio
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import jwt
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

KAFKA = os.environ.get("RINGFENCE_KAFKA", "127.0.0.1:9092")
TRUST_DOMAIN = os.environ.get("RINGFENCE_TRUST_DOMAIN", "ringfence.local")
PREFIX = os.environ.get("RINGFENCE_TOPIC_PREFIX", "ringfence")
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:ringfence")


async def ask(key_file: str, task_id: str, target: str, verb: str, resource: str) -> dict[str, Any]:
    identity = json.loads(Path(key_file).read_text())
    agent, signing_key = identity["id"], jwt.PyJWK({**identity["jwk"], "alg": "ES256"})
    kid = ECKey.import_key(identity["jwk"]).thumbprint()
    reply_key = ECKey.generate_key("P-256")
    jwk = reply_key.as_dict(private=False)
    public = {name: jwk[name] for name in ("kty", "crv", "x", "y")}

    now, jti = int(time.time()), str(uuid.uuid4())
    request_id = str(uuid.uuid5(NAMESPACE, f"{agent} {jti}"))
    request = jwt.encode(
        {
            "iss": agent,
            "aud": TRUST_DOMAIN,
            "iat": now,
            "exp": now + 60,
            "jti": jti,
            "task_id": task_id,
            "scope": [{"target": target, "verbs": [verb], "resources": [resource]}],
            "ttl_s": 300,
            "reason": "an example without the SDK",
            "reply_key": public,
        },
        signing_key.key,
        algorithm="ES256",
        headers={"kid": kid, "typ": "ringfence.credential.request+jwt"},
    )

    consumer = AIOKafkaConsumer(
        f"{PREFIX}.credential.reply.v1", bootstrap_servers=KAFKA, auto_offset_reset="latest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=KAFKA, acks="all")
    await consumer.start()
    await producer.start()
    try:
        for partition, end in (await consumer.end_offsets(consumer.assignment())).items():
            consumer.seek(partition, end)
        key = agent.rpartition("/")[2].encode()
        await producer.send_and_wait(f"{PREFIX}.credential.request.v1", request.encode(), key=key)
        async with asyncio.timeout(60):
            async for record in consumer:
                reply = open_reply(record.value, request_id, reply_key)
                if reply is None:
                    continue
                decision = jwt.decode(reply["decision"], options={"verify_signature": False})
                if decision["outcome"] != "approval_required" and (
                    "lease" in reply or "refusal" in reply or decision["outcome"] == "denied"
                ):
                    return {**reply, "decision": decision}
        raise AssertionError("not reached")
    finally:
        await producer.stop()
        await consumer.stop()


def open_reply(value: bytes | None, request_id: str, reply_key: ECKey) -> dict[str, Any] | None:
    """A reply to this request, or None: what is for others and for gateways stands on the same topic."""
    try:
        sealed = value or b""
        header = json.loads(jwt.utils.base64url_decode(sealed.split(b".")[0]))
        if not isinstance(header, dict) or header.get("kid") != request_id:
            return None
        opened = jwe.decrypt_compact(sealed, reply_key, algorithms=["ECDH-ES", "A256GCM"]).plaintext
        reply: dict[str, Any] = json.loads(opened or b"")
        return reply
    except (ValueError, RecursionError, JoseError):
        return None


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    answer = asyncio.run(ask(*sys.argv[1:6]))
    delivery = answer.get("delivery")
    credential = jwt.decode(delivery, options={"verify_signature": False})["credential"] if delivery else None
    lease = jwt.decode(answer["lease"], options={"verify_signature": False}) if "lease" in answer else {}
    print(json.dumps({
        "request_id": answer["request_id"],
        "outcome": answer["decision"]["outcome"],
        "reasons": answer["decision"].get("reasons", []),
        "credential": {k: v for k, v in credential.items() if k != "value"} if credential else None,
        "lease": lease.get("lease_id"),  # without a credential, it is the handle for the gateway
    }))  # fmt: skip
