"""The policy service (PDP): decides credential requests by the invariant in code, the Rego bundle, and people's
approvals.
"""
