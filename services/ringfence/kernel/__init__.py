"""The kernel: infrastructure that the packages above build on. It contains no concept of the domain.

Enters: settings, key files, bytes of HTTP and signed messages, records of Kafka, signals of the process.
Leaves: verified messages, parsed HTTP, published records, spans, metrics, log lines.
Imports: `messages`, which is below it, and no other package. Inside, from the ground up: `base`; `crypto`,
`tracing` and `http1` beside each other; `kafka`; `service`.
Read first:
- `crypto/jws.py`: how a message is signed, parsed and verified.
- `kafka/consumer.py`: delivery at least once, retries, commits.
- `service/runtime.py`: start, work, drain and stop of a service.
`errors` and `keys` are names of 0.1. They go with 0.3.
"""
