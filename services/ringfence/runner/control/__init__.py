"""The control channel between a runner and the init of its sandbox: one connection, one JSON message a line.

The order is fixed. `R` is the runner, `I` the init:

    I  public_key    the public half of the key that init made
    R  enrol         the runner's enrolment token for that key
    I  enrolment     the signed `instance.enrol` for the registry
    R  start         the command, and all that it needs
    I  started       or start_failed, with which the channel ends
    I  ended         the command's exit code, and what its connections carried

Everything that comes from inside is untrusted: a message out of order, too late, too long or of another form
ends the channel.
Enters: messages of init.
Leaves: messages of the runner, and errors (`ControlLostError`) to `runner.lifecycle`.
Imports: messages.py only `kernel.base` and `runner.sandbox.backend`, no pydantic, as init imports it.
channel.py also `kernel.crypto` and `ringfence.messages`.
Read first: messages.py (the messages and their codec; both sides import it), channel.py (the runner's side).
"""
