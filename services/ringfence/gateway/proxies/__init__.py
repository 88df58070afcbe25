"""The gateway as authorizer of other proxies: Envoy's protocol, forward auth."""
