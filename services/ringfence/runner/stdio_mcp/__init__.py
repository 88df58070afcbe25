"""MCP servers on standard input and output in a run, and the gateway between them and their client.

The client's messages go to the gateway by the run's own socket. The gateway decides each of them, and forwards what it
allows to a second socket, which this package bridges to the server's standard input. So nothing gets to the server but
what the gateway forwarded, and nothing of it gets to the client but what the gateway passed on.

    client ─ lines ─▶ client_bridge ─ HTTP ─▶ RUN.sock, the gateway ─ HTTP ─▶ RUN.stdio, upstream ─ lines ─▶ server
"""
