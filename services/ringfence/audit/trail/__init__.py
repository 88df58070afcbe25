"""The signed trail: handover of events, the writer of the hash chains, recovery at take-over, and proofs.

Enters: events from `audit.records` and the detector (`Intake`); records of `audit.intake`; for proofs also
records of `audit` and `audit.checkpoint`.
Leaves: `audit.intake`, chained events on `audit` (one Kafka transaction a batch), checkpoints on
`audit.checkpoint`, dead letters of unauthorised records, inclusion and consistency proofs (RFC 9162) for
`audit.api`.
Imports: `audit.memory`, `audit.verification`; below: `model`, `kernel`, `messages`.
Read first:
  handover.py      signs the events that are to be chained, and looks up which events were handed over
  chain_writer.py  appends events and signs checkpoints; fences the writer before it
  proofs.py        proofs from tree hashes and checkpoints
"""
