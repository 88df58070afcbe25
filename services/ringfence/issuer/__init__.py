"""The issuer: checks each allowed decision again, mints the credential, and records its lease.

Enters: `credential.decision`; the tables of records and runs; withdrawn grants on `approval.response`; HTTP
requests of resource servers (metadata, JWKS, introspection) and of gateways (a credential sealed again).
Leaves: leases in Redis, then on `lease`; `credential.reply` (sealed to the agent or to gateways),
`service.event` (refusals), `dead-letter`; credentials at targets, by `backends`; HTTP answers.
Imports: `backends`, `model`, `kernel`, `messages`, and what else lies below the services; no other service.
`domain` does no I/O.
Read first:
  domain.py     decides whether a decision may become a lease, from what agent, policy and approvers signed
  decisions.py  handles a batch: check, activate in Redis, publish leases, reply
  minting.py    mints credentials that leave something at their target: announced first, active last
"""
