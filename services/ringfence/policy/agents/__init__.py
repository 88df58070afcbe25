"""What policy knows of agents: holdings, use, inventory, shared keys."""
