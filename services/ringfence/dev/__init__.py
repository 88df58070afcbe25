"""The embedded stack: a Kafka broker and a Valkey server from wheels, all services as processes."""
