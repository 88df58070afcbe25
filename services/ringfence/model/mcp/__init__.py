"""The Model Context Protocol (MCP): messages, revisions, rules, filtered results and sealed states, for any transport.

A caller reads a message (`messages.read_message`), checks it against the revision that it states (`revisions`, and
`headers` over HTTP), decides each of its parts by the request map (`McpMessage.parts`), and filters what the server
answers (`results.ResultFilter`).
"""
