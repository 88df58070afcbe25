"""Scopes: globs of resources, containment, intersection, and the invariant that a credential never exceeds a
limit.

Enters: scopes and permissions of messages, from `lifecycle`, `requests`, policy, issuer, gateway, backends
and the SDK.
Leaves: the permissions that exceed a limit, intersections, deadlines; ScopeError or DeadlineError.
Imports: `target_settings` and `unknown_fields` of the model, not `identity` beside it; `kernel` and
`messages`. `globs`, `rule` and `scope` do no I/O.
Read first: `globs.py` (the grammar, and exact comparison), `scope.py` (difference and intersection),
`rule.py` (the invariant).
"""
