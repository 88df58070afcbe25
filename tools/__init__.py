"""Generators and checks that maintainers run; no part of the package."""
