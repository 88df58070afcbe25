"""Keys, JWS, JWE, identity tokens, and the trust bundle that says who may sign what."""
