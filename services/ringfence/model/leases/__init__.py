"""Leases: life cycle, verification, epochs and revocations."""
