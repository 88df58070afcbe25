"""Sandboxes for commands that nobody trusts: what one is, and the backends that make it.

This package knows nothing of Kafka, agents or the gateway. `backend` has the interface; `bubblewrap` and `oci`
implement it. `machine` says what this machine offers.
"""
