"""The registry of users, agents, targets and tasks: verifies signed commands, and publishes signed records.

Enters: commands of users, provisioners and agents on `registry.command` (one partition, in order); enrolments
of instances and read requests by HTTP; keys of token issuers by OIDC discovery.
Leaves: records on `user`, `agent`, `target`, `task`, signed `heartbeat`, `service.event` (answers to
commands, enrolments, key warnings), `trust` (restores an overwritten bundle), `dead-letter`; HTTP answers.
Imports: `model`, `kernel`, `messages`, and what else lies below the services; no other service. `domain` does
no I/O.
Read first:
  domain.py     decides a command: the changed record, nothing, or a refusal
  commands.py   handles one command: verify, decide, publish
  enrolment.py  exchanges a platform's identity token for an enrolled instance key
"""
