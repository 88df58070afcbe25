"""Decides on requests for credentials: the rule, the Rego bundle, and the approvals of people."""
