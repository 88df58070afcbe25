"""Credential requests: the records that each is judged on, approvals, grants, and their form for policy."""
