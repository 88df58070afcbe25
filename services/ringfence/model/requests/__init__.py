"""Credential requests: the records that decide each one, approvals, grants, and the policy input made of them."""
