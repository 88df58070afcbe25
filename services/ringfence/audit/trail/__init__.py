"""The signed trail: handover, the chain's writer, recovery at take-over, proofs."""
