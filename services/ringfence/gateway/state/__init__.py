"""What the gateway knows: live leases, revocations, and how fresh its view is."""
