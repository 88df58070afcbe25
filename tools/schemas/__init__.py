"""Generators of schemas and references."""
