"""HTTP access for agents: signed messages in, sealed replies out, without a connection to Kafka."""
