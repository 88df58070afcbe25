"""The policy service (PDP): decides credential requests by invariant, Rego bundle, and people's approvals.

Enters: `credential.request`, `approval.response`; the tables of records and runs; `credential.decision`,
`approval.request`, `lease` and `service.event`, read back; with webhooks also what people sign; HTTP queries.
Leaves: `credential.decision`, `approval.request`, `credential.reply` (denied, or waiting), `service.event`,
`dead-letter`, webhook notices, HTTP answers.
Imports: `backends`, `client`, `rego`, `model`, `kernel`, `messages`; no other service. `domain` does no I/O.
Read first:
  domain.py                rules on a request: the invariant, then the bundle, then the target's floors
  incoming/                one handler for each message (`credential_requests`, `approvals`, `grants`)
  decisions/responder.py   publishes a decision, then what follows from it; a repetition is equal
"""
