"""Leases: life cycle, verification, unverified looks, epochs, revocations, and the freshness of their topics."""
