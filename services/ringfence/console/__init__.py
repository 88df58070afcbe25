"""The console: a web application for sponsors, operators and auditors, without any authority of its own.

It reads through the services' HTTP APIs for people who signed a session statement there, and relays to Kafka
what they signed on the sign page. It has no right to read Kafka, and its key commands nothing (ADR 0077).
Enters: HTTP requests of browsers, answers of the sign page, JSON of the services' APIs.
Leaves: HTML pages and live updates; what people signed, on `approval.response`, `registry.command` and
`revocation.request`.
Imports: `client`, `model`, `kernel`, `messages`; no other service, no `backends`, `rego`,
`model.lease_store`, Redis or Kafka consumer.
Read first: http.py (the routes), commands.py (form to message), questions.py (sealed questions, and their
answers).
"""
