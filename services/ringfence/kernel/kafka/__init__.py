"""Kafka: connection, producer, consumer groups, readers of whole topics, administration."""
