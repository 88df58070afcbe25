"""Users from their directory: a SCIM 2.0 endpoint (RFC 7643, 7644) that holds a provisioner's key.

Enters: SCIM requests with a bearer token; the tables `user` and `heartbeat`; answers to its commands on
`service.event` and `dead-letter`.
Leaves: provisioner commands on `registry.command`, signed with that key, by `client`; SCIM resources and
errors; `service.event` (refused requests).
Imports: `client`, `model`, `kernel`, `messages`, and what else lies below the services; no other service.
Nothing is kept here: the users are in the verified records.
Read first: http.py (the routes), provisioning.py (carries out changes, one request at a time), app.py
(wiring, and the refresh of entitlements before they expire).
"""
