"""Init: the first program of ours in a sandbox, and the parent of the command.

`command` builds the command line by which a runner starts it. Inside, `bootstrap` or `__main__` enter `main`.
A run waits for all that init imports, so before the command starts it imports neither asyncio nor HTTP. Init
has the uid of the command. The command can kill it or stop it, which ends the run or its connections. It
cannot read or change its memory: init is not dumpable, and the system calls for it are refused.
Enters: control messages of the runner; signals.
Leaves: the command's process, its proxy and relays; control messages.
Imports: `runner.control.messages`, `runner.sandbox.backend`, `client.task_proxy`, `kernel.base`,
`model.identity`; no pydantic, Kafka, Redis, httpx or service.
Read first: main.py (the steps of init), instance.py (key and enrolment), supervisor.py (proxy, signals, end).
"""
