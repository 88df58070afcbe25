"""The audit trail's hash chain and Merkle tree, and their verification."""

SETTLE_S = 60.0
"""Seconds that a record may be without an event: audit may not have reached it yet."""
