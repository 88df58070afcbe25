"""The decision's fast path: cached decisions for repeated requests. `path` is its only entry point."""
