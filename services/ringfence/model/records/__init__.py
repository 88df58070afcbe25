"""Verified records of the registry: command chains, the directory, consent, instances, runs, delegations.

Enters: records of the registry's topics, enrolments, run records, signed messages; HTTP requests.
Leaves: verified records and keys, chain and enrolment errors, alarms about refused records.
Imports: `lifecycle` and all of the model below it, `kernel` and `messages`. Nearly every service imports it.
Read first:
- `directory.py`: the local table of users, agents, targets and tasks; verifies on first use.
- `command_chain.py`: folds a record's commands, and checks that each signer was entitled, up to the root.
- `api_access.py`: authenticates callers of the HTTP APIs, and decides what they may see.
"""
