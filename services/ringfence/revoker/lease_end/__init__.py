"""The end of leases: expiry, revocation, removal of the credential at its target."""
