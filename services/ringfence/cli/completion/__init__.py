"""Completion of command lines in bash, zsh and fish.

Enters: the typed line, from a shell's script by `ringfence __complete`; ids from services and topics.
Leaves: candidates, on stdout; never a question or an error. Values are safe for any shell.
Imports: `cli.shared`, `cli.commands.target_templates`, `client`, `model`, `kernel`, `messages`.
Read first: complete.py (answers within a limit, and finds ids), command_line.py (finds what may come next).
"""
