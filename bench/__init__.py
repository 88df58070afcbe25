"""Benchmarks: each prints its numbers and the machine, none asserts a time."""
