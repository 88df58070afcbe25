"""Kafka and Redis held against each other: view, comparison, rebuild, repair."""
