"""Backend for SSH certificates, one for each lease, and its helper on the host."""
