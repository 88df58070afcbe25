"""Init: the first program of ours in a sandbox, and the parent of the command.

`command` says how a runner starts it. Inside, `bootstrap` or `__main__` enter `main`. What it imports is what a run
waits for: nothing before the command starts needs asyncio or HTTP.

Init has the uid of the command. The command can kill it or stop it, which ends the run or its connections. It cannot
read or change its memory: init is not dumpable, and the system calls for it are refused.
"""
