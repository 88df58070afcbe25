"""`ringfence doctor`: checks of a deployment, each with what to do about a problem.

Enters: the settings; answers of Kafka, Redis, services, OPA and this machine.
Leaves: one `CheckResult` for each check; exit 1 if one is wrong.
Imports: `cli.shared`, `client`, `policy`, `runner`, `rego`, and the layers below.
Read first: command.py (the checks, and their order).
"""
