"""Sandboxes for untrusted commands: the interface, and the backends that implement it.

This package knows nothing of Kafka, agents or the gateway. `backend` has the interface; `bubblewrap` and
`oci` implement it. `machine` says what this machine offers.
Enters: a `SandboxSpec`, from `runner.lifecycle`.
Leaves: a started `Sandbox`, its exit, resource usage and destruction.
Imports: `kernel.base` alone. From the ground up: `mount_points`; `backend`, `descriptors`, `processes`,
`launcher`, `network_setup`; `records`, `network`; `cgroups`, `seccomp`, `oci_client`; `machine`,
`root_filesystem`; the backends.
Read first: backend.py (specification and contract), bubblewrap.py (sandboxes by bwrap), seccomp.py (system
calls).
"""
