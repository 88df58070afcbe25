"""The end of leases: expiry, the records that end a lease, removal of the credential at its target."""
