"""The fast path for very many leases that end together: ends computed before they are due."""
