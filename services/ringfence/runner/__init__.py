"""The runner: runs a task's command in a fresh sandbox.

`sandbox` makes sandboxes. `init` is the first program inside, and `control` the channel between it and the runner.
"""
