"""revoker: ends leases when their time is over, or somebody entitled says so; never gives up, never ends one twice."""
