"""Consistency of Redis with Kafka: Kafka's view, comparison, rebuild, repair, and the recheck of issued leases."""
