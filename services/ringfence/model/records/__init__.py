"""Records of the registry, verified: command chains, the directory, consent, instances, delegations."""
