"""Webhook notices to people: questions that wait, keys that were added, receipts of what a passkey signed.

Enters: questions of policy (from `policy.decisions.responder`) and of gateways (`approval.request`), `user`
records, and what people sign (`approval.response`, `revocation.request`, `registry.command`).
Leaves: signed HTTP posts (Standard Webhooks) to the settings' webhooks. Responses are not read, and nothing
depends on a notice.
Imports: `policy.decision_log`, `policy.subscribers`; below: `model`, `kernel`, `messages`.
Read first: notices.py (delivers notices in the background), webhook.py (URL, body, signature), receipts.py
(receipts).
"""
