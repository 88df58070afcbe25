"""The HTTP API of policy."""
