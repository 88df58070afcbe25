"""Kafka: connection, producer, consumer groups, readers of whole topics, administration.

Enters: records of the topics in `messages.topics`; messages to publish; the settings of the connection.
Leaves: `Received` records to handlers and tables, with nothing verified; published records; dead letters.
Imports: `kernel.crypto`, `kernel.tracing`, `kernel.base` and `messages`; aiokafka and FastStream.
Read first:
- `consumer.py`: consumer groups; delivery at least once, and when an offset is committed.
- `producer.py`: `Publisher`, and `TransactionalPublisher` for a single writer.
- `table_reader.py`: `Follower`, which feeds local tables with whole topics, without a consumer group.
"""
