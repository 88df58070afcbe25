"""Codec of lease records in Redis: `pack` makes a signed record a quarter of its size, `unpack` restores the
same JWS.

Three forms of one record:

- the compact JWS, which services sign, verify and publish;
- the packed form, which goes to and from Redis (`records`);
- the stored form, which scripts make of it inside Redis (`lua`): without what the records of a shard share.

Lua reads some fields inside packed records (status, `seq`, deadline, agent), so both halves of the codec are
here. `RECORDS_LUA` is included by the scripts that read or write records (`scripts`). A change of either form
makes Redis unreadable for other versions: it needs new key names, so that Redis is rebuilt (`keys.Keys`).

Enters: a compact JWS (`pack`) or packed bytes (`unpack`), from the lease store. Leaves: the other form.
Imports: `keys` of the lease store, `kernel` and `messages`. Modules outside import this package, never its
modules.
Read first: `records.py` (the packed form), then `lua.py` (the stored form).
"""

from __future__ import annotations

from ringfence.model.lease_store.codec.lua import MAX_LUA_ARGUMENTS, RECORDS_LUA
from ringfence.model.lease_store.codec.records import pack, unpack, unverified_names

__all__ = ["MAX_LUA_ARGUMENTS", "RECORDS_LUA", "pack", "unpack", "unverified_names"]
