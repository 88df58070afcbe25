"""Credential requests: the records that decide each one, approvals, grants, and the policy input made of
them.

Enters: verified requests, approvals, grants and run orders; the directory. For policy, issuer, gateway and
runner.
Leaves: violations and missing approvals as reasons, tables of grants, the records as policy input.
Imports: `records` and all of the model below it, `kernel` and `messages`; not `leases` and `audit_log` beside
it.
Read first:
- `facts.py`: checks the invariant for one request.
- `approvals.py`: which approvals a request needs, and whether those given are enough.
- `grants.py`: what an approval in advance covers, and the table of grants and withdrawals.
"""
