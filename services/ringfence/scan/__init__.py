"""`ringfence scan`: a secret scanner for credentials that agents inherit. It shows which containment rings each breaks.

It needs no server and no account, and opens no connection. The layers, from the ground up: the catalogue of credential
kinds, bounded parsers and file access, `readers` (one file for each location and format), `scanner` (which turns what
readers yield into findings), and `reports`.

A secret exists in the memory of the process that read it, as a `SecretValue`. It leaves that process as a fingerprint
and a length.
"""
