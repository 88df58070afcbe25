"""A server of the Model Context Protocol by which an agent asks for credentials: `ringfence mcp serve`.

Enters: tool calls of one agent, on standard input.
Leaves: results on standard output, without any credential: an agent gets the handle of a lease; requests and
releases, sent by `client`.
Imports: `client`, `kernel`, `messages`, and what else lies below the services; the official SDK `mcp`; no
other service.
Read first: tools.py (names, schemas, error texts), agent_tools.py (what each tool does), stdio.py (serves
them).
"""
