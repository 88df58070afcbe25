"""Ask with curl and joserfc for a credential, in a run or at the socket of a task: TASK TARGET VERB RESOURCE."""

import json, os, subprocess, sys, time, uuid  # noqa: E401, I001 - forty lines are the point
from pathlib import Path
from typing import Any
from joserfc import jwe, jws
from joserfc.jwk import ECKey, import_key

# fmt: off
CURL = ["curl", "-sS", "--fail-with-body", "--unix-socket", os.environ["RINGFENCE_DOOR"].removeprefix("unix:")]
RUN = os.environ.get("RINGFENCE_RUN_INSTANCE")  # a folder with the key that was made in the run, and its enrolment

def call(path: str, *options: str) -> str:
    return subprocess.check_output([*CURL, *options, f"http://ringfence/v1/{path}"], text=True)

def verified(signed: str, type: str, keys: dict[str, Any]) -> dict[str, Any]:
    header = jws.extract_compact(signed.encode()).headers()
    assert header["typ"] == f"ringfence.{type}+jwt", f"this is no {type}"
    return dict(json.loads(jws.deserialize_compact(signed, keys[header["kid"]], algorithms=["ES256", "EdDSA"]).payload))

(task, target, verb, resource), now = sys.argv[1:], int(time.time())
me = json.loads(Path(RUN, "key.json").read_text() if RUN else Path(os.environ["RINGFENCE_IDENTITY"]).read_text())
key, reply_key = import_key(me["jwk"]), ECKey.generate_key("P-256")
claims = {"iss": me["id"], "aud": os.environ["RINGFENCE_TRUST_DOMAIN"], "iat": now, "exp": now + 60, "task_id": task,
          "jti": str(uuid.uuid4()), "ttl_s": 300, "reason": "an example without the SDK",
          "scope": [{"target": target, "verbs": [verb], "resources": [resource]}],
          "reply_key": {name: reply_key.as_dict(private=False)[name] for name in ("kty", "crv", "x", "y")},
          **({"enrolment": Path(RUN, "enrolment.jws").read_text()} if RUN else {})}
protected = {"alg": "ES256", "kid": key.thumbprint(), "typ": "ringfence.credential.request+jwt"}
request = jws.serialize_compact(protected, json.dumps(claims), key)
id, count = json.loads(call("requests", "-H", "Content-Type: application/jose", "--data-binary", request))["id"], 0
root = import_key(jws.extract_compact((bundle := call("trust")).encode()).headers()["jwk"])
assert root.thumbprint() == os.environ["RINGFENCE_TRUST_ROOT"], "another root signed the trust bundle"
services = verified(bundle, "trust.bundle", {root.thumbprint(): root})["services"]
keys = {role: {one["kid"]: import_key({name: value for name, value in one["jwk"].items() if value})
               for service in services if role in service["roles"] for one in service["keys"]
               if one["not_before"] <= now < one["not_after"]} for role in ("policy", "issuer")}
while True:  # one reply after the other: those about approvals come before the last one
    if not (sealed := call(f"requests/{id}?wait=30s&after={count}")).startswith("{"):  # JSON: nothing has come yet
        count, reply = count + 1, json.loads(jwe.decrypt_compact(sealed, reply_key).plaintext or b"")
        decision = verified(reply["decision"], "credential.decision", keys["policy"])
        assert decision["request"] == request, "the decision is about another request"
        name, typ = ("delivery", "credential.delivery") if "delivery" in reply else ("lease", "lease")
        if name in reply:  # a delivery has the "credential", with its secret "value"; else the gateway has it
            sys.exit(print("allowed: lease", verified(reply[name], typ, keys["issuer"])["lease_id"]))
        if decision["outcome"] == "denied" or "refusal" in reply:
            sys.exit(f"denied: {reply.get('refusal') or decision['reasons']}")
