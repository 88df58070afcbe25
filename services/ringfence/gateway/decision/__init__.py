"""How the gateway decides one action."""
