"""One module for each command, or group of commands.

Enters: parsed options, from `cli.main`.
Leaves: printed results, signed commands and requests by `client`.
Imports: `cli.shared`, `client`, `dev`, and of the services those parts that run here (`scan`, `runner`,
`revoker`, `policy`, `gateway`, `mcp_server`, `sign_page`), when the command runs.
Read first: serve.py (runs services), init.py (makes root, service keys and the first operator), request.py
(asks for a credential).
"""
