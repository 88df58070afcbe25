"""Code that commands share: options, output, arguments.

Enters: option values and records.
Leaves: checked values, printed tables and JSON.
Imports: `client`, `model`, `kernel`, `messages`; no service, and no command.
Read first: options.py (shared options and their parsers), output.py (text and JSON without control
characters), arguments.py (ids and permissions; resolves the beginning of an id).
"""
