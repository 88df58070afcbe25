"""For resource servers: verify tokens and proofs of possession, and challenge."""
