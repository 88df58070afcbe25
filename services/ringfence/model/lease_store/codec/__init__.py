"""The binary form of a lease's record in Redis, which Lua reads in place."""
