"""The state of the gateway: live leases, revocations, and how fresh its view is."""
