"""Policy's HTTP API, for people and for other enforcement points. It only reads, and stores nothing.

Enters: HTTP requests with a token of a person, or of a target's resource server (AuthZEN).
Leaves: JSON: pending approvals, decisions, explanations, grants, usage, inventory, reach, AuthZEN
evaluations.
Imports: `policy.agents`, `policy.decisions`, `policy.decision_log`, `policy.domain`, `policy.grants`; below:
`client`, `model`, `kernel`, `messages`.
Read first: decisions.py (who sees which request), inventory.py (the base of the APIs about agents),
authzen.py (evaluates a question by the same rules as a request).
"""
