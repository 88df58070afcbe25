"""The registry of users, agents, targets and tasks: verifies signed commands, keeps the lifecycle, publishes signed
records.
"""
