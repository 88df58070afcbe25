"""Detection rules over the audit trail, and their findings as OCSF Detection Findings.

Enters: records of `audit`, from the reader in `audit.app`; answers of the index (`TrailQueries`).
Leaves: findings, handed over to the hash chain by `audit.trail.handover.Intake`.
Imports: `audit.events`, `audit.trail`, `audit.settings`; below: `model`, `kernel`, `messages`. The rules are
pure.
Read first: detector.py (runs the rules, publishes each finding once), rule.py (the protocol of a rule),
order.py (rules about order and timing; reach.py has the others).
"""
