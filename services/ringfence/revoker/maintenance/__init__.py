"""Periodic work: orphaned credentials, retention, heartbeats."""
