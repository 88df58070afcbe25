"""The contract between all parts of Ringfence: every message and every Kafka topic, declared once."""
