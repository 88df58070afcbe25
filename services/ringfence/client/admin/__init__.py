"""For administrators: signed commands to the registry, and what they would change.

Enters: calls of operators, sponsors, provisioners and the root; users of an identity provider.
Leaves: signed commands and their outcomes (`service.event`), previews, trust bundles and key files.
Imports: as `client`; it uses the model, `client.passkeys` and `client.reports`. `client.approvals` and
`client.agent` use its `command_client`.
Read first:
- `command_client.py`: sends a signed command, and waits for the answer.
- `administrator.py`: commands on users, agents, targets, tasks and revocations.
- `trust_setup.py`: the root ceremony: root, service keys, trust bundle, first operator.
"""
