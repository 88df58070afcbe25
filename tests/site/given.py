"""What pages take for given, as files in the present folder: `python -m tests.site.given WHAT`.

request TASK KEY_FILE    request.jws, a signed credential request
kubernetes               jwks.json and token: a cluster's keys, and a token of its service account
login                    jwks.json of an issuer for users
notes                    notes.py, the MCP server of docs/gateway-mcp.md on standard input and output
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import unquote

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from ringfence.kernel.crypto.jws import parse, sign, sign_payload
from ringfence.kernel.crypto.keys import SigningKey, b64decode
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG
from ringfence.messages.approval import Approval
from ringfence.messages.base import Permission
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.registry import KeyPossession, UserInvite
from ringfence.messages.trust import TrustBundle
from tests.support import platform_tokens
from tests.support.oidc_tokens import TokenIssuer
from tests.support.passkey_makers import Maker
from tests.support.passkeys import SoftwarePasskey

DOMAIN = "ringfence.local"
"""The trust domain of `ringfence dev`."""


def request(task: str, key_file: str) -> None:
    """Sign a request for the target of `ringfence dev`."""
    key = SigningKey.load(Path(key_file))
    now = int(time.time())
    message = CredentialRequest(
        iss=key.id, aud=DOMAIN, iat=now, exp=now + 60, jti=str(uuid.uuid4()), task_id=task, ttl_s=300, delivery="agent",
        reason="a request in a file", reply_key=SigningKey.generate("spiffe://ringfence.local/reply").public,
        scope=(Permission(target="platform", verbs=("read",), resources=("env/staging/web",)),),
    )  # fmt: skip
    Path("request.jws").write_text(sign(message, key))


def kubernetes() -> None:
    """Write the keys and a token of the cluster that docs/instances.md names."""
    issuer = TokenIssuer("https://kubernetes.default.svc.cluster.local")
    Path("jwks.json").write_text(issuer.jwks())
    claims = platform_tokens.claims("kubernetes", issuer, f"spiffe://{DOMAIN}/enrol")
    Path("token").write_text(issuer.token(claims))


def login() -> None:
    """Write the keys of an issuer that users sign in at."""
    Path("jwks.json").write_text(TokenIssuer("https://login.acme.example").jwks())


def notes() -> None:
    """Write the server for the version of the SDK that is installed here, which is the first."""
    over_http = Path("docs/examples/mcp_1/notes.py").read_text()
    Path("notes.py").write_text(over_http.replace('transport="streamable-http"', ""))


def passkey(user: str, invitation: str, maker: Maker | None = None) -> None:
    """Make a passkey, and prove it in answer to an invitation, as a browser does on the sign page."""
    key = SigningKey.generate(f"spiffe://{DOMAIN}/user/{user}")
    key.save(Path(f"{user}.key.json"))
    now = int(time.time())
    made = _software_passkey(user, _sign_origin())
    possession = KeyPossession(
        iss=key.id, aud=DOMAIN, iat=now, exp=now + 600, jti=str(uuid.uuid4()), user_id=user, jwk=key.public,
        invitation=parse(invitation).unverified_claims(UserInvite).jti,
    )  # fmt: skip
    record = made.record(now + 600).model_dump(mode="json")
    package = {name: record[name] for name in ("jwk", "credential_id", "rp_id", "aaguid", "backup_eligible")}
    if maker is not None:
        x, y = (int.from_bytes(b64decode(part)) for part in (key.public.x, key.public.y or ""))
        package["attestation_object"], package["client_data"] = maker.attest(
            ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key(), aaguid=bytes(16),
            credential_id=b64decode(package["credential_id"]), rp_id=package["rp_id"], origin=made.origin,
        )  # fmt: skip
        Path("maker.pem").write_bytes(maker.pem)
    Path(f"passkey-{user}.json").write_text(
        json.dumps({"user": user, "invitation": invitation, "possession": sign(possession, made), **package})
    )


def touch(user: str, link: str) -> None:
    """Fetch an approval, and sign it: the browser and the touch of a person who looked at the page."""
    origin, _, source = link.partition("/#from=")
    headers = {"Origin": origin}
    message = httpx.get(unquote(source), headers=headers).raise_for_status().json()["message"]
    stamp = {
        "iss": f"spiffe://{DOMAIN}/user/{user}",
        "aud": DOMAIN,
        "iat": int(time.time()),
        "jti": str(uuid.uuid4()),
    }
    assert message["typ"] == Approval.typ
    payload = json.dumps({**stamp, **message["claims"]}).encode()
    answer = sign_payload(Approval, payload, _software_passkey(user, origin))
    httpx.post(unquote(source), headers=headers, json={"answer": answer}).raise_for_status()


def _software_passkey(user: str, origin: str) -> SoftwarePasskey:
    key = SigningKey.load(Path(f"{user}.key.json"))
    return SoftwarePasskey(key.id, key.public, key.kid, WEBAUTHN_ALG, key._key, origin=origin)


def _sign_origin() -> str:
    bundle = parse(Path(".ringfence/trust-bundle.jws").read_text().strip()).unverified_claims(TrustBundle)
    return next(one.origin for one in bundle.origins if one.use == "sign")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["request", task, key_file]:
            request(task, key_file)
        case ["kubernetes"]:
            kubernetes()
        case ["login"]:
            login()
        case ["notes"]:
            notes()
        case ["passkey", user, invitation]:
            passkey(user, invitation)
        case ["attested", user, invitation]:
            passkey(user, invitation, Maker())
        case ["touch", user, link]:
            touch(user, link)
        case _:
            sys.exit(__doc__)
