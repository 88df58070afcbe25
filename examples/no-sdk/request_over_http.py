"""Ask for a credential over HTTP, without Kafka and without the SDK: httpx and joserfc are all it takes.

    python examples/no-sdk/request_over_http.py KEY_FILE TASK_ID TARGET VERB RESOURCE

Reads RINGFENCE_DOOR (the gateway's URL, or unix:PATH of the task's socket), RINGFENCE_TRUST_DOMAIN and
RINGFENCE_TRUST_ROOT. Verifies what the reply holds by the trust bundle, and prints it without the credential itself.
"""

import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
from joserfc import jwe, jws, jwt
from joserfc.jwk import ECKey, import_key

DOOR = os.environ.get("RINGFENCE_DOOR", "http://127.0.0.1:8707")
TRUST_DOMAIN = os.environ.get("RINGFENCE_TRUST_DOMAIN", "ringfence.local")
ALGORITHMS = ["ES256", "EdDSA"]


class Gateway:
    """Calls the gateway. Each call has a DPoP proof; through a task's socket none is needed, and none is in the way."""

    def __init__(self, key: Any, alg: str) -> None:
        self.key, self.alg, self.nonce = key, alg, ""
        socket = DOOR.removeprefix("unix:") if DOOR.startswith("unix:") else None
        self.base = "http://ringfence" if socket else f"{DOOR}/ringfence"
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=socket) if socket else None, timeout=90)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = httpx.Response(0)
        for _ in range(2):  # a second time with the nonce that the first answer brings
            header = {"alg": self.alg, "typ": "dpop+jwt", "jwk": self.key.as_dict(private=False)}
            claims = {
                "jti": str(uuid.uuid4()),
                "htm": method,
                "htu": self.base + path,
                "iat": int(time.time()),
            }
            claims |= {"nonce": self.nonce} if self.nonce else {}
            proof = jwt.encode(header, claims, self.key, algorithms=[self.alg])
            headers = {"DPoP": proof, "Content-Type": "application/jose"}
            answer = self.http.request(method, self.base + path, headers=headers, **options)
            self.nonce = answer.headers.get("DPoP-Nonce", self.nonce)
            if answer.status_code < 400:
                return answer
        sys.exit(f"{answer.status_code}: {answer.text}")


def ask(key_file: str, task_id: str, target: str, verb: str, resource: str) -> dict[str, Any]:
    identity = json.loads(Path(key_file).read_text())
    key = import_key(identity["jwk"])
    gateway = Gateway(key, "ES256" if identity["jwk"]["kty"] == "EC" else "EdDSA")
    reply_key, now = ECKey.generate_key("P-256"), int(time.time())
    claims = {
        "iss": identity["id"], "aud": TRUST_DOMAIN, "iat": now, "exp": now + 60, "jti": str(uuid.uuid4()),
        "task_id": task_id, "scope": [{"target": target, "verbs": [verb], "resources": [resource]}],
        "ttl_s": 300, "reason": "an example over HTTP",
        "reply_key": {name: reply_key.as_dict(private=False)[name] for name in ("kty", "crv", "x", "y")},
    }  # fmt: skip
    header = {"alg": gateway.alg, "kid": key.thumbprint(), "typ": "ringfence.credential.request+jwt"}
    request = jwt.encode(header, claims, key, algorithms=[gateway.alg])
    id = gateway.call("POST", "/v1/requests", content=request).json()["id"]
    trusted, count = trusted_keys(gateway.call("GET", "/v1/trust").text), 0
    while True:
        answer = gateway.call("GET", f"/v1/requests/{id}", params={"wait": "30s", "after": count})
        if answer.status_code == 202:  # nothing yet
            continue
        count += 1
        opened = jwe.decrypt_compact(answer.text, reply_key, algorithms=["ECDH-ES", "A256GCM"])
        reply = json.loads(opened.plaintext or b"")
        decision = verified(reply["decision"], "credential.decision", "policy", trusted)
        assert decision["request"] == request, "the decision is about another request"
        if "refusal" in reply:
            refusal = verified(reply["refusal"], "issuer.refusal", "issuer", trusted)
            return {"outcome": "refused", "reasons": refusal["reasons"]}
        if "delivery" in reply:
            credential = verified(reply["delivery"], "credential.delivery", "issuer", trusted)["credential"]
            return {"outcome": "allowed", "credential": {k: v for k, v in credential.items() if k != "value"}}
        if "lease" in reply:  # the credential is at the gateway
            return {
                "outcome": "allowed",
                "lease": verified(reply["lease"], "lease", "issuer", trusted)["lease_id"],
            }
        if decision["outcome"] == "denied":
            return {"outcome": "denied", "reasons": decision["reasons"]}
        print(f"{decision['outcome']}: waiting", file=sys.stderr)


def trusted_keys(bundle: str) -> dict[Any, Any]:
    """The keys of services by role and thumbprint, from a trust bundle that the pinned root signed."""
    root = import_key(jws.extract_compact(bundle.encode()).headers()["jwk"])
    assert root.thumbprint() == os.environ["RINGFENCE_TRUST_ROOT"], "the bundle is signed by another root"
    services = json.loads(jws.deserialize_compact(bundle, root, algorithms=ALGORITHMS).payload)["services"]
    return {
        (role, record["kid"]): import_key({name: value for name, value in record["jwk"].items() if value})
        for service in services
        for role in service["roles"]
        for record in service["keys"]
        if record["not_before"] <= time.time() < record["not_after"]
    }


def verified(compact: str, type: str, role: str, trusted: dict[Any, Any]) -> dict[str, Any]:
    """The claims of a message of this type that a service with this role signed. Raises an error if none did."""
    header = jws.extract_compact(compact.encode()).headers()
    assert header["typ"] == f"ringfence.{type}+jwt", "the message is of another type"
    key = trusted[role, header["kid"]]
    claims: dict[str, Any] = json.loads(jws.deserialize_compact(compact, key, algorithms=ALGORITHMS).payload)
    return claims


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    print(json.dumps(ask(*sys.argv[1:6])))
