"""HTTP targets: the map from requests to verbs and resources, and MCP."""
