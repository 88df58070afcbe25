"""The embedded stack (a Kafka broker and a Valkey server from wheels, services as processes) and the demos.

Enters: options from `ringfence dev` and `ringfence demo`.
Leaves: child processes on loopback, an example organisation made by signed commands, printed steps of the
story. Children end with the parent.
Imports: `client`, `runner`, `model`, `kernel`, `messages`, and every layer below `cli`; it starts services
and the command line as processes.
Read first: stack.py (starts everything in order, stops it in reverse), processes.py (children that cannot
outlive the stack), demo.py (the story of `ringfence demo`).
"""
