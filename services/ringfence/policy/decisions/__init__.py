"""Decisions of policy: evaluation, publication, replay and explanation.

Enters: verified requests from `policy.incoming` and AuthZEN questions; for replay and explanation recorded
decisions.
Leaves: signed `credential.decision`, `approval.request` and `credential.reply`; reports of a replay (for
`ringfence policy`) and explanations.
Imports: `policy.agents`, `policy.decision_log`, `policy.domain`, `policy.grants`, `policy.notifications`;
below: `backends`, `rego`, `model`, `kernel`, `messages`.
Read first: evaluator.py (evaluates one request with the records as known now), responder.py (publishes the
decision first, then the messages to those concerned), replay.py (compares outcomes under another bundle).
"""
