"""Ends of leases for those outside: CAEP `session-revoked` events (Shared Signals Framework 1.0), pushed and polled."""
