"""The runner: runs a task's command in a fresh sandbox. So far it has the sandbox layer alone (`sandbox`)."""
