"""Policy's state about agents: holdings, usage, inventory, and keys that two processes use at once.

Enters: decisions of this process, records of `lease` and `service.event`, changes of the records' directory.
Leaves: what an agent holds and used, for `policy.decisions` and `policy.api`; findings of shared keys
(`service.event`).
Imports: `policy.domain`; below: `model`, `kernel`, `messages`.
Read first: holdings.py (what each agent holds; missing records never widen it), agent_index.py (one inventory
row for each agent, refreshed in the background), usage.py (verbs used by day, in 30 days).
"""
