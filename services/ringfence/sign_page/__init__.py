"""The sign page: static files on which people sign with passkeys. It has no server code, and trusts only the root.

`build` makes the files from `static`, and `app` serves them. An attacker who controls the serving origin can misuse
every touch there, so serve them from an origin of their own (docs/passkeys.md).
"""
