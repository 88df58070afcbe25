"""The sign page: static files on which people sign with passkeys. It has no server code, and believes the root alone.

`build` makes the files from `static`, and `app` serves them. Whoever controls the origin that serves them can misuse
every touch there, so serve them from an origin of their own (docs/passkeys.md).
"""
