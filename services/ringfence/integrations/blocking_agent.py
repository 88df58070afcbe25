"""An agent for programs without asyncio: it lives on an event loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from ringfence.client.agent.agent import Agent, OnPending
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.errors import InvalidCallError
from ringfence.integrations.source import REFRESH_BEFORE_S, CredentialSource
from ringfence.messages.credential import Delivery

T = TypeVar("T")


class BlockingAgent:
    """A `ringfence.Agent` whose calls wait. Threads may share it.

    ```python
    with BlockingAgent(Agent.connect(key="deploy-bot.json")) as agent:
        credential = agent.request(task=task_id, target="staging", verbs=["read"], resources=["env/x"], reason="...")
    ```
    """

    def __init__(self, agent: Agent) -> None:
        """`agent`: one that is not entered; leaving this leaves it."""
        self.agent = agent
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect. `with` does it. Raises as entering an `Agent`."""
        if self._loop is not None:
            return
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="ringfence-agent", daemon=True)
        self._thread.start()
        try:
            self.run(self.agent.start())
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """Disconnect. `with` does it. Idempotent."""
        if self._loop is not None:
            try:
                self.run(self.agent.close())
            finally:
                self._stop()

    def request(
        self,
        *,
        task: str,
        target: str,
        verbs: Sequence[str],
        resources: Sequence[str],
        reason: str,
        ttl_s: int = 300,
        timeout_s: float | None = 60.0,
        on_pending: OnPending | None = None,
        break_glass: bool = False,
        delivery: Delivery | None = None,
    ) -> IssuedCredential:
        """See `Agent.request`. `on_pending` is called in the agent's thread."""
        return self.run(
            self.agent.request(
                task=task, target=target, verbs=verbs, resources=resources, reason=reason, ttl_s=ttl_s,
                timeout_s=timeout_s, on_pending=on_pending, break_glass=break_glass, delivery=delivery,
            )
        )  # fmt: skip

    def release(
        self,
        credential: IssuedCredential | str,
        *,
        reason: str = "no longer needed",
        timeout_s: float | None = None,
    ) -> None:
        """See `Agent.release`."""
        self.run(self.agent.release(credential, reason=reason, timeout_s=timeout_s))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the agent's loop, and wait for its result.

        Raises InvalidCallError if the agent is not connected, or from its own thread, which would wait for itself.
        """
        if self._loop is None or threading.current_thread() is self._thread:
            work.close()
            why = (
                "not connected: use it as a context manager"
                if self._loop is None
                else "called from its own thread"
            )
            raise InvalidCallError(f"the agent is {why}")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt of the one who waits: nobody takes the result any more
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _stop(self) -> None:
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


class BlockingCredentialSource:
    """A `CredentialSource` for programs without asyncio. Threads may share it."""

    def __init__(
        self,
        agent: BlockingAgent,
        *,
        task: str,
        target: str,
        verbs: Sequence[str],
        resources: Sequence[str],
        reason: str,
        ttl_s: int = 300,
        timeout_s: float | None = 60.0,
        on_pending: OnPending | None = None,
        delivery: Delivery | None = None,
        refresh_before_s: float = REFRESH_BEFORE_S,
    ) -> None:
        """See `CredentialSource`."""
        self.agent = agent
        self._source = CredentialSource(
            agent.agent, task=task, target=target, verbs=verbs, resources=resources, reason=reason, ttl_s=ttl_s,
            timeout_s=timeout_s, on_pending=on_pending, delivery=delivery, refresh_before_s=refresh_before_s,
        )  # fmt: skip

    @property
    def target(self) -> str:
        """The id of the target."""
        return self._source.target

    def current(self) -> IssuedCredential:
        """The current credential; a new one if there is none, or if it ends soon. Raises as `Agent.request`."""
        return self.agent.run(self._source.current())

    def renew(self) -> IssuedCredential:
        """A new credential, whatever is left of the present one. Raises as `current`."""
        return self.agent.run(self._source.renew())

    def is_fresh(self, lease_id: str) -> bool:
        """See `CredentialSource.is_fresh`."""
        return self._source.is_fresh(lease_id)

    def close(self) -> None:
        """Wipe and release all that is held. Idempotent."""
        self.agent.run(self._source.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
