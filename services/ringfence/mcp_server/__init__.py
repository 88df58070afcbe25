"""A server of the Model Context Protocol by which an agent asks for credentials: `ringfence mcp serve`."""
