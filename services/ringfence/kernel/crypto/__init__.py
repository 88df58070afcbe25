"""Keys, JWS, JWE, identity tokens, and the trust bundle that says who may sign what.

Enters: compact JWS and JWE, tokens of external issuers, WebAuthn assertions, key files, the trust bundle.
Leaves: verified claims (`Signed`), signed and encrypted messages, JWKs; InvalidMessageError, SignatureError
or ExpiredError for a message that does not verify.
Imports: `kernel.base` and `messages`; not `tracing` and `http1`, which are beside it.
Read first:
- `jws.py`: signs, parses and verifies messages. It is the hottest code of the services.
- `trust_store.py`: decides which keys speak for which service, from the pinned root on.
- `keys.py`: private keys in files, public keys as JWKs.
"""
