"""The shared domain model, on which several services must agree: scopes and the invariant, record chains, local
tables.
"""
