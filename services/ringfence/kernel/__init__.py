"""The kernel: infrastructure that every package builds on. It contains no concept of the domain."""
