"""The name of 0.1 for `ringfence.kernel.base.errors`, which code of others imports. It goes with 0.3."""

from ringfence.kernel.base.errors import *  # noqa: F403
