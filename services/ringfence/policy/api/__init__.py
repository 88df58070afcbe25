"""Policy's HTTP API."""
