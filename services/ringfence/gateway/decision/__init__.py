"""The decision core: authenticates the sender, authorizes the action, asks the bundle, opens the credential.

Enters: `Gate.decide(identity, attempt)` and `RelayGate` calls, from the data plane and `gateway.proxies`;
records of `credential.reply` and `approval.response`, from the readers in `gateway.wiring`.
Leaves: a recorded `Verdict`, headers to inject, relay permits; questions on `approval.request`;
`service.event`.
Imports: `gateway.events`, `gateway.state`, `gateway.hosts` and the layers below; not `gateway.dataplane` or
`wiring`.
Read first:
  gate.py       the steps of a decision in order; the first that refuses ends it
  approvals.py  asks a person about one action, and holds the request
  injection.py  opens sealed credentials, and makes the headers with them
"""
