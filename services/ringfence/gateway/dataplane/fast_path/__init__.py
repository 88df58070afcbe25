"""The coroutine-free path for repeated requests."""
