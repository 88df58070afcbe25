"""Policy's state about agents: holdings, usage, inventory, shared keys."""
