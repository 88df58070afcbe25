"""For people who approve: questions, grants, actions, reviews of break glass.

Enters: questions from policy and gateways, records of the topics, answers of people.
Leaves: signed approvals, denials, grants, withdrawals and reviews; differences from earlier answers.
Imports: as `client`; it uses `client.admin`, `client.passkeys` and `client.reports`.
Read first:
- `sponsor.py`: `Sponsor`, pending requests and their answers.
- `grants.py`: approvals in advance, and reviews of break glass.
- `history_comparison.py`: how a request differs from answers of the last 30 days.
"""
