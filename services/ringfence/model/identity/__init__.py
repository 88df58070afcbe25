"""Agent identities: SPIFFE IDs, attestation by a platform, API tokens."""
