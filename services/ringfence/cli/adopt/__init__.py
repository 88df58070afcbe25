"""`ringfence adopt`: the way from a finding of the scan to an agent that works without the credential.

Enters: one file with a credential, and what the person typed.
Leaves: the secret in its place, records, the file without the secret; a state file for each target until `--finish`.
Imports: `cli.shared`, `client`, `scan`, `backends`, and the layers below.
Read first: steps.py (what is done, in which order); cli/commands/adopt.py is the command.
"""
