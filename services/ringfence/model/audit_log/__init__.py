"""The audit trail's hash chain and Merkle tree, and their verification."""
