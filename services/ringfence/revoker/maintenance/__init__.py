"""Periodic work: removal of orphaned credentials at targets, tombstones for old leases, heartbeats."""
