"""The sign page: static files on which people sign with passkeys. It has no server code.

`build` makes the files from `static`, and `app` serves them. The page trusts only the root. An attacker who
controls the serving origin can misuse every touch there, so serve them from an origin of their own
(docs/passkeys.md).
Enters: the settings (origin, RP ID, trust domain, root), the files of `static`; HTTP GET and HEAD.
Leaves: the page's files, their digests, and their headers.
Imports: `kernel`, `messages`, and what else lies below the services; no other service.
Read first: build.py (makes the files; same input, same bytes), app.py (serves them), static/main.js (the
page).
"""
