"""What the gateway records: actions, refusals, a task's history."""
