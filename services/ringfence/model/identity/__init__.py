"""Identities of agents: SPIFFE IDs, attestation by a platform, tokens for APIs."""
