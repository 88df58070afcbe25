"""MCP servers on standard input and output in a run, and the gateway between them and their client.

The client's messages go to the gateway by the run's own socket. The gateway decides each, and forwards
allowed ones to a second socket, which this package bridges to the server's standard input. All answers of the
server pass the gateway too.

    client ─ lines ─▶ client_bridge ─ HTTP ─▶ RUN.sock, the gateway ─ HTTP ─▶ RUN.stdio, upstream ─ lines ─▶ server

Enters: the client's lines, the gateway's requests; called by `ringfence mcp wrap`.
Leaves: the server's messages.
Imports: `runner.lifecycle`, `runner.sandbox.backend`; below: `model`, `kernel`, `messages`.
Read first: wrap.py (runs server and bridges), server_channel.py (exchanges, HTTP).
"""
