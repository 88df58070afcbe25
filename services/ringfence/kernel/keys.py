"""The name of 0.1 for `ringfence.kernel.crypto.keys`, which code of others imports. It goes with 0.3."""

from ringfence.kernel.crypto.keys import *  # noqa: F403
