"""The HTTP API for agents: they post signed messages and fetch sealed replies, without a connection to Kafka."""
