"""The steps of init: key, enrolment, command, and then proxy, relays and signals until the command ends."""

from __future__ import annotations

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
from ringfence.runner.init.environment import command_environment
from ringfence.runner.init.instance import InstanceKey, sign_enrolment, write_instance, write_program
from ringfence.runner.init.listeners import RunnerConnection, open_listeners
from ringfence.runner.sandbox.backend import CONTROL, INSTANCE

FAILED: Final = 125
"""The exit code where init itself failed: the command was not started."""


def main() -> int:
    """Run the command that the runner sends. Returns its exit code."""
    try:
        process.prepare()
        return _run(RunnerConnection(CONTROL))
    except ConnectionError:
        return FAILED  # the runner says why, if it can
    except (OSError, RingfenceError, ValueError) as error:
        sys.stderr.write(f"ringfence init: {error}\n")
        return FAILED


def _run(runner: RunnerConnection) -> int:
    key = InstanceKey()
    runner.send(PublicKeyMessage(key.jwk))
    runner.send(EnrolmentMessage(sign_enrolment(key, runner.receive(EnrolMessage))))
    command = runner.receive(StartCommand)
    write_instance(key, command, INSTANCE)
    write_program(INSTANCE)
    opened = open_listeners(command.relays)
    variables = command_environment(dict(os.environ), command, opened.proxy_port)
    process.block_signals()
    try:
        pid = process.start(command.argv, variables, command.working_directory)
    except process.StartError as error:
        sys.stderr.write(f"{error.reason}\n")
        runner.send(StartFailedMessage(error.code, error.reason))
        return error.code
    process.release_streams()
    runner.send(StartedMessage())
    # asyncio and HTTP: what takes longest to import, the command need not wait for.
    from ringfence.runner.init.supervisor import supervise

    return supervise(runner, pid, opened)
