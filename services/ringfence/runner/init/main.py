"""The steps of init: key, enrolment, command, and then proxy, relays and signals until the command ends."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.runner.control.messages import (
    EnrolmentMessage,
    EnrolMessage,
    PublicKeyMessage,
    StartCommand,
    StartedMessage,
    StartFailedMessage,
)
from ringfence.runner.init import process
from ringfence.runner.init.connection import RunnerConnection
from ringfence.runner.sandbox.backend import CONTROL, INSTANCE

FAILED: Final = 125
"""The exit code where init itself failed: the command was not started."""


def main() -> int:
    """Run a command as the runner says. Returns the exit code."""
    try:
        process.prepare()
        return _run(RunnerConnection(CONTROL))
    except (OSError, RingfenceError) as error:
        sys.stderr.write(f"ringfence init: {error}\n")
        return FAILED


def _run(runner: RunnerConnection) -> int:
    from ringfence.kernel.crypto.keys import SigningKey

    # Its owner is not known yet.
    key = SigningKey.generate("")
    runner.send(PublicKeyMessage(key.public.model_dump(exclude_none=True)))
    from ringfence.runner.init.instance import keep, sign_enrolment

    enrol = runner.receive(EnrolMessage)
    key = dataclasses.replace(key, id=agent_of(enrol.trust_domain, enrol.agent_id))
    runner.send(EnrolmentMessage(sign_enrolment(key, enrol)))
    command = runner.receive(StartCommand)
    keep(key, command, INSTANCE)
    from ringfence.runner.init import environment, listeners

    opened = listeners.open_listeners(command.relays)
    variables = environment.command_environment(dict(os.environ), command, opened.proxy_port)
    process.block_signals()
    try:
        pid = process.start(command.argv, variables, command.working_directory)
    except process.StartError as error:
        sys.stderr.write(f"{error.reason}\n")
        runner.send(StartFailedMessage(error.code, error.reason))
        return error.code
    process.release_streams()
    runner.send(StartedMessage())
    from ringfence.runner.init.supervisor import supervise

    return supervise(runner, pid, opened)


def agent_of(trust_domain: str, agent_id: str) -> str:
    """The SPIFFE ID of the agent that the run is an instance of."""
    from ringfence.model.identity.spiffe_ids import spiffe_id

    return spiffe_id(trust_domain, "agent", agent_id)
