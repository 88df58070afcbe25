"""One run of an agent's command, from its claim on Kafka to the destruction of its sandbox.

Enters: a `RunPlan`, from `runner.active_runs` (orders) the command line or `runner.stdio_mcp` (local runs).
Leaves: records on `run`, a sandbox with the run's private folder and sockets, a `RunReport`.
Imports: `runner.control`, `runner.init.command`, `runner.sandbox`; below: `client`, `model`, `kernel`,
`messages`.
Read first: execution.py (the steps of a run, in order), plan.py (the plan, and the checks before the start),
sweep.py (removes the sandboxes of dead runners, and reports their runs as lost).
"""
