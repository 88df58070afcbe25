"""Users, agents, targets and tasks: verifies signed commands, keeps the lifecycle, publishes signed records."""
