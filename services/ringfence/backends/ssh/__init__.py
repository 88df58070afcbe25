"""SSH certificates for one lease, and the helper on the host."""
