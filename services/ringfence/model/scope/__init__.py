"""Scopes: globs of resources, containment, intersection, and the invariant that a credential never exceeds a limit."""
