"""The audit trail's hash chain and Merkle tree, and their verification. Pure.

Enters: audit events and signed checkpoints, from audit (writer) and the client's auditor (verifier).
Leaves: linked events, tree heads, inclusion and consistency proofs, faults of a partition.
Imports: by the layers `records` and all of the model below it, `kernel` and `messages`; it uses
`kernel.base.ids` and `messages.audit` only.
Read first:
- `chain.py`: how an event names the hash of the one before it.
- `merkle.py`: tree heads and proofs (RFC 9162).
- `verification.py`: `ChainVerifier`, which reports faults of one partition.
"""

SETTLE_S = 60.0
"""Seconds that a record may be without an event: audit may not have reached it yet."""
