"""The data plane's fast path: repeated requests without a coroutine. `path` is its only entry point."""
