"""Backend for PostgreSQL (14 or newer): a role for each lease.

Enters: leases and targets of kind `postgres`; the credentials of Ringfence, by `TargetAccess`.
Leaves: roles with exact rights, and their removal with the sessions.
Imports: as `backends`; asyncpg in `backend` alone.
Read first: `backend.py` (mint, undo, connections), `privileges.py` (a scope as PostgreSQL rights, pure).
"""
