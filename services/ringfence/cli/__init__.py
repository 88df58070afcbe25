"""The command line `ringfence`. Each command group has a file, which `main` imports on demand.

Enters: arguments, environment, settings file.
Leaves: tables, sentences and JSON on stdout; exit status 0 done, 1 refused or failed, 2 wrong use; signed
commands, by `client`.
Imports: every layer below `cli`, and `dev`; not `ringfence.testing` or `ringfence.faststream`. `main` imports
only typer and little else at start, so `--help` is instant; a command imports what it needs when it runs.
Read first: main.py (the list of commands, lazy import, errors), commands/ (one file for each command or
group), shared/options.py (options that many commands share).
"""
