"""The console: a web application for sponsors, operators and auditors, without any authority of its own.

It reads through the services' HTTP APIs for people who signed a session statement there, and relays to Kafka what they
signed on the sign page. It has no right to read Kafka, and its key commands nothing (ADR 0077).
"""
