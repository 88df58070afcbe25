"""issuer: checks the rule for itself, makes credentials and leases them, and says which are still good."""
