"""One run of an agent's command, from its claim on Kafka to the destruction of its sandbox."""
