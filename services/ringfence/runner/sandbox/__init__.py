"""Sandboxes for untrusted commands: the interface, and the backends that implement it.

This package knows nothing of Kafka, agents or the gateway. `backend` has the interface; `bubblewrap` and `oci`
implement it. `machine` says what this machine offers.
"""
