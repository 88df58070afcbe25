"""Sign an API token without Ringfence's SDK: PyJWT and joserfc are all it takes. It is good for one call, for 60 s.

    TOKEN=$(python docs/examples/api_token.py KEY_FILE SERVICE)

KEY_FILE is that of a user, or of a target's resource server.
SERVICE is registry, policy, issuer, revoker, gateway or audit.
"""

import json
import sys
import time
import uuid
from pathlib import Path

import jwt
from joserfc.jwk import ECKey


def api_token(key_file: str, service: str) -> str:
    identity = json.loads(Path(key_file).read_text())
    trust_domain = identity["id"].removeprefix("spiffe://").partition("/")[0]
    now = int(time.time())
    return jwt.encode(
        {
            "iss": identity["id"],
            "aud": f"{trust_domain}/{service}",
            "iat": now,
            "exp": now + 60,
            "jti": str(uuid.uuid4()),
        },
        jwt.PyJWK({**identity["jwk"], "alg": "ES256"}).key,
        algorithm="ES256",
        headers={"kid": ECKey.import_key(identity["jwk"]).thumbprint(), "typ": "ringfence.api+jwt"},
    )


print(api_token(*sys.argv[1:]))
