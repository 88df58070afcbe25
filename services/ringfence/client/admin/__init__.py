"""For administrators: signed commands to the registry, and what they would change."""
