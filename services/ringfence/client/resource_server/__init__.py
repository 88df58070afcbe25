"""For resource servers: verify tokens and proofs of possession, and challenge.

Enters: the access token and DPoP proof of an HTTP request; the issuer's published keys and introspection.
Leaves: `VerifiedToken`, which says what the token allows, or an HTTP refusal with a challenge;
TokenRejectedError.
Imports: as `client`; it uses `client.agent.dpop` and `model.scope`.
Read first:
- `verifier.py`: `TokenVerifier`, the checks of a token.
- `dpop_proofs.py`: checks that the sender holds the token's key.
- `asgi.py`: `TokenGuard`, middleware that rejects requests without a valid token.
"""
