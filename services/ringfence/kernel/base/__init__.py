"""Settings, metrics, log limits, the clock, errors, ids, text and files. It imports no other part of the kernel."""
