"""Reports from the services' HTTP APIs: leases, inventory, coverage, the audit trail."""
