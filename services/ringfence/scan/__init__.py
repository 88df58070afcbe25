"""`ringfence scan`: a secret scanner for inherited credentials. It shows which containment rings each breaks.

It needs no server and no account. Only one reader opens a connection, with `--metadata`, to the cloud
metadata service. A secret exists in the process that read it, as a `SecretValue`. It leaves it as a
fingerprint and a length.
Enters: files, environments and processes of this machine, all untrusted; options from `ringfence scan`.
Leaves: a `Report`, as JSON, SARIF, OCSF or HTML; baselines.
Imports: `kernel.base` alone. From the ground up: `limits`; `names`, `checksums`, `findings`; `kinds`,
`documents`, `source_files` and others; `candidates`; `readers`; `tree_walk`; `file_scan`, `reports` and
others; `worker_pool`; `scanner`, `external_scanners`.
Read first: scanner.py (lists places, reads in parallel, joins findings), candidates.py (what is a
credential), findings.py (the typed result).
"""
