"""Backend for SSH certificates, one for each lease, and its helper on the host.

Enters: leases and targets of kind `ssh`. Leaves: certificates; leases announced and ended at the host by the
helper.
Imports: as `backends`. `host_helper.py` runs on the host as root, and needs only Python 3.9 and the OpenSSH
server.
Read first: `backend.py` (mint and undo), `host_helper.py` (logins and sessions on the host),
`certificates.py` (a scope as a certificate's commands).
"""
