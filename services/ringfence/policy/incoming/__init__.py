"""Policy's input: requests, approvals and grants; verification, admission control and load shedding.

Enters: `credential.request` and `approval.response`, from `policy.subscribers`.
Leaves: decisions, by `policy.decisions.responder`; `service.event` about grants, refused withdrawals and shed
requests. InvalidMessageError sends a record to the dead letters.
Imports: `policy.agents`, `policy.decision_log`, `policy.decisions`, `policy.domain`; below: `model`,
`kernel`, `messages`.
Read first: credential_requests.py (decides requests; a batch may run concurrently), approvals.py (ends
waiting requests; of each request one answer at a time), admission.py (verifies records, limits rates and
pending approvals).
"""
