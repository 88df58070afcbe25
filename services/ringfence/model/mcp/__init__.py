"""The Model Context Protocol (MCP): messages, revisions, rules, filtered results and sealed states, for any
transport.

A caller reads a message (`messages.read_message`), checks it against the revision that it states (`headers`),
decides each of its parts by the request map (`McpMessage.parts`), and filters the server's answers
(`results.ResultFilter`).

Enters: bytes of messages and answers, from the gateway; rules of a target's request map.
Leaves: `McpMessage`, matches and captures, filtered answers; McpMessageError for an ambiguous message.
Imports: `kernel` and `messages`; of the model `scope`, `identity` and lower.
Read first: `messages.py` (strict parser), `headers.py` (revisions and headers), `results.py` (filters of
answers).
"""
