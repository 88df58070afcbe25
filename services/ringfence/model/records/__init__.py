"""Verified records of the registry: command chains, the directory, consent, instances, delegations."""
