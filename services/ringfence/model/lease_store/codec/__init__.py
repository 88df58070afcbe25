"""Codec of lease records in Redis: `pack` makes a signed record a quarter of its size, `unpack` restores the same JWS.

Three forms of one record:

- the compact JWS, which everybody signs, verifies and publishes;
- the packed form, which goes to and from Redis (`records`);
- the stored form, which scripts make of it inside Redis and nobody else sees (`lua`): without what the records of a
  shard have in common.

Lua reads some fields inside packed records (status, `seq`, deadline, agent), so both halves of the codec are here.
`RECORDS_LUA` is included by the scripts that read or write records (`scripts`). A change of either form makes Redis
unreadable for other versions: it needs new key names, so that Redis is rebuilt (`keys.Keys`).
"""

from __future__ import annotations

from ringfence.model.lease_store.codec.lua import MAX_LUA_ARGUMENTS, RECORDS_LUA
from ringfence.model.lease_store.codec.records import pack, unpack, unverified_names

__all__ = ["MAX_LUA_ARGUMENTS", "RECORDS_LUA", "pack", "unpack", "unverified_names"]
