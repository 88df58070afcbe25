"""Decisions of policy: evaluation, publication, replay and explanation."""
