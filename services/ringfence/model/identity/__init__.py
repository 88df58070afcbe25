"""Agent identities: SPIFFE IDs, attestation by a platform, runners as issuers, API tokens.

Enters: ids, selectors, claims of identity tokens, the trust store; from registry, policy, runner and the SDK.
Leaves: SPIFFE IDs, the reason why a selector is invalid, the selectors that match, signed API and enrolment
tokens.
Imports: `target_settings` and `unknown_fields` of the model, `kernel` and `messages`; not `scope` beside it.
Read first: `spiffe_ids.py` (how ids become SPIFFE IDs, and back), `attestation.py` (which tokens match an
agent's selectors), `runners.py` (a runner's issuer name and its enrolment tokens).
"""
