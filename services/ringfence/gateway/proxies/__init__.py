"""External authorization for other proxies: Envoy's `ext_authz` and forward auth."""
