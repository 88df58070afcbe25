"""What services report over HTTP: leases, inventory, coverage, the audit trail."""
