"""The gateway's data plane: listeners, connections, HTTP/1.1, forwarding."""
