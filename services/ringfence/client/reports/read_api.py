"""Client of the HTTP read APIs of registry, policy, revoker and audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import orjson

from ringfence.client.arguments import Lifetime
from ringfence.client.errors import ApiError
from ringfence.client.key_file import load_key
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.config_file import unread_here
from ringfence.kernel.base.http_client import service_client
from ringfence.kernel.base.settings import load
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Scope
from ringfence.model.identity.api_tokens import api_token
from ringfence.model.identity.spiffe_ids import SubjectKind

if TYPE_CHECKING:
    import httpx

Filters = Mapping[str, str | int | None]
"""Filters by name. Those with the value None are left out."""
Service = Literal["registry", "policy", "issuer", "revoker", "audit", "gateway"]


def _why(error: Exception, url: str) -> str:
    """The reason of a failed call. By TLS it may be either side's certificate, which no type of error tells."""
    name = type(error).__name__
    if "certificate verify failed" in str(error):
        return f"{name}: its certificate does not verify, see RINGFENCE_HTTP_CA_FILE"
    return (
        f"{name}; if it wants a certificate, see RINGFENCE_HTTP_CLIENT_CERT_FILE"
        if url.startswith("https:")
        else name
    )


class ReadApi(Lifetime):
    """One user's view: operators and auditors see all, sponsors their own agents.

    Each call has its own bearer token.
    """

    def __init__(
        self,
        key: SigningKey | Path | str | None = None,
        settings: ClientSettings | None = None,
        *,
        clock: Clock | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        """See `Agent.connect`; the URLs are in the settings. Raises IdentityError, KeyFileError, SettingsError."""
        self.settings = settings or load(ClientSettings)
        self.key = load_key(key, self.settings)
        self._clock: Clock = clock or SystemClock()
        self._http = service_client(self.settings, timeout_s=timeout_s)

    async def close(self) -> None:
        """Disconnect. `async with` does it."""
        await self._http.aclose()

    async def get(self, service: Service, *path: str, **query: str | int | Sequence[str] | None) -> Any:
        """GET `/v1/<path>` of a service, as parsed JSON. Queries that are None are left out; a sequence is repeated.

        Raises ApiError with the service's own message; its `status` is None if the service did not answer.
        """
        params = {name: value for name, value in query.items() if value is not None}
        return await self._ask(service, path, params=params)

    async def _ask(self, service: Service, path: Sequence[str], **request: Any) -> Any:
        """Return the answer to a GET, or to a POST if `request` has `json`. It changes nothing at the service."""
        import httpx

        if nothing := [part for part in path if not part or "/" in part]:
            # It would be another path, and the service's answer would be about something else.
            raise ApiError(f"there is no {nothing[0]!r}: what has an id has one without a slash", status=404)
        base = str(getattr(self.settings, f"{service}_url")).rstrip("/")
        url = "/".join([base, "v1", *(quote(part, safe="") for part in path)])
        try:
            try:
                response = await self._send(service, url, request)
            except (
                httpx.RemoteProtocolError
            ):  # a kept connection was closed just then: it is a read, and safe again
                response = await self._send(service, url, request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ApiError(
                f"the {service} at {base} does not answer ({_why(error, base)}); is it running? "
                f"Its address is RINGFENCE_{service.upper()}_URL{unread_here()}"
            ) from None
        try:
            answer = orjson.loads(response.content)
        except ValueError:
            raise ApiError(
                f"{url} answered {response.status_code} and no JSON; is this the {service}? "
                f"Its address is RINGFENCE_{service.upper()}_URL",
                status=response.status_code,
            ) from None
        if response.is_error:
            message = answer.get("message") if isinstance(answer, dict) else None
            code = answer.get("error") if isinstance(answer, dict) else None
            raise ApiError(
                str(message) if message else f"{url} answered {response.status_code}",
                code=code,
                status=response.status_code,
            )
        return answer

    async def _send(self, service: Service, url: str, request: Mapping[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._token(service)}"}  # each token counts once
        method = "POST" if "json" in request else "GET"
        return await self._http.request(method, url, headers=headers, **request)

    # --- registry ---

    async def records(self, kind: SubjectKind, **query: str | None) -> list[Any]:
        """All users, agents, targets or tasks that the caller may see: `[{id, revision, state}]`."""
        listed: list[Any] = (await self.get("registry", f"{kind}s", **query))[f"{kind}s"]
        return listed

    async def record(self, kind: SubjectKind, id: str) -> Any:
        """One user, agent, target or task: `{id, revision, state}`. Raises ApiError (404) if there is none."""
        return await self.get("registry", f"{kind}s", id)

    async def proposals(self, *, all: bool = False) -> list[Any]:
        """Widening commands that wait for a second person and that the caller may see, oldest first; with `all`, also
        those of the last day that no longer wait. See `ringfence.client.admin.proposals`.
        """
        listed: list[Any] = (await self.get("registry", "proposals", all=1 if all else None))["proposals"]
        return listed

    # --- policy ---

    async def usage(self, agent_id: str) -> Any:
        """Return what an agent holds now and used in 30 days, against its ceiling.

        Raises ApiError (404) if there is none.

        `{agent_id, registered_at, since, ceiling, used: [{target, verb, first_used, last_used, days}], never_used,
        held, narrower}`; `narrower` is a ceiling that would have sufficed, or None where all was used.
        """
        return await self.get("policy", "agents", agent_id, "usage")

    async def combinations(self, ceiling: Scope) -> list[str]:
        """Return a sentence for each forbidden combination that a ceiling would allow by itself. Raises ApiError."""
        document = {"ceiling": [permission.model_dump(mode="json") for permission in ceiling]}
        answer = await self._ask("policy", ("combinations",), json=document)
        return [str(one) for one in answer["combinations"]]

    async def inventory(
        self, filters: Filters | None = None, *, after: str | None = None, limit: int = 100
    ) -> Any:
        """Return a page of the agents that the caller may see: `{at_ms, totals, agents, after, cursor, gaps}`.

        `totals`, on the first page alone, are the sums over all matching agents. Continue with `after` until it is
        None. `filters`: agent, sponsor, status, target; orphans, unused, standing, keys_ending (1); keys_within_s.
        """
        return await self.get("policy", "inventory", after=after, limit=limit, **(filters or {}))

    async def inventory_changes(self, cursor: str, filters: Filters | None = None) -> Any:
        """Return the agents that changed since a page: `{at_ms, agents, cursor, gaps}`. `filters` as for the page.

        Each agent has `fits`: whether it matches the filters. Raises ApiError, with the code `cursor_lost` if policy
        no longer knows what changed.
        """
        return await self.get("policy", "inventory", "changes", after=cursor, **(filters or {}))

    async def grants(self) -> list[dict[str, Any]]:
        """Return what was approved ahead and the caller may see, by its end."""
        listed: list[dict[str, Any]] = (await self.get("policy", "grants"))["grants"]
        return listed

    # --- revoker ---

    async def leases(
        self,
        *,
        agent: str | None = None,
        task: str | None = None,
        target: str | None = None,
        user: str | None = None,
        sponsor: str | None = None,
        status: str | None = None,
        overdue: bool = False,
    ) -> Any:
        """Return leases that have not ended, by deadline: `{leases: [...], more}`; `more` is true where there are over
        1000.

        `user`: on whose behalf. `sponsor`: the agent's sponsor when the lease was issued. `overdue`: only leases that
        are revoked and that their targets have not removed for a while.
        """
        return await self.get(
            "revoker",
            "leases",
            agent=agent,
            task=task,
            target=target,
            user=user,
            sponsor=sponsor,
            status=status,
            overdue=1 if overdue else None,
        )

    async def lease(self, lease_id: str) -> Any:
        """Return one lease, also for a while after its end. Raises ApiError (404) if there is none."""
        return await self.get("revoker", "leases", lease_id)

    async def runs(
        self,
        *,
        agent: str | None = None,
        task: str | None = None,
        runner: str | None = None,
        all: bool = False,
    ) -> Any:
        """Return runs that are not over, the latest first: `{runs: [...], more}`; `more` is true where there are over
        1000.

        `all`: also those that ended in the last days.
        """
        return await self.get(
            "revoker", "runs", agent=agent, task=task, runner=runner, all=1 if all else None
        )

    async def run(self, id: str) -> Any:
        """Return one run, by its own id or by that of its order. Raises ApiError (404) if no runner has said
        anything of it.
        """
        return await self.get("revoker", "runs", id)

    async def pools(self, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """The pools of runners that take orders now, by name: `[{name, labels, free, runners}]`.

        `labels`: only pools that have all of these. `free`: how many more runs a pool may start now.
        """
        found: list[dict[str, Any]] = (await self.get("revoker", "pools"))["pools"]
        wanted = (labels or {}).items()
        return [pool for pool in found if wanted <= pool["labels"].items()]

    # --- audit ---

    async def trace(self, id: str, kind: str | None = None) -> Any:
        """Return the history of a lease, request, task, agent, user or run: `{id, kind, truncated, roots: [node]}`.

        A node is `{id, kind, title, at_ms, duration_ms, actor, detail, children: [node]}`.
        """
        return await self.get("audit", "trace", id, kind=kind)

    async def break_glass(self, *, unreviewed: bool = False) -> list[Any]:
        """The uses of break glass, oldest first, each with its `review` or None."""
        uses: list[Any] = (await self.get("audit", "break-glass", unreviewed=1 if unreviewed else None))[
            "uses"
        ]
        return uses

    async def events(
        self,
        filters: Filters | None = None,
        *,
        after: str | None = None,
        before: str | None = None,
        limit: int = 100,
        agent: str | None = None,
        task: str | None = None,
        request: str | None = None,
        lease: str | None = None,
    ) -> Any:
        """Return `{events, after, before, looked_at_ms}`: the latest OCSF events, oldest first.

        With `after` these are the events since, with `before` older ones. `before` is None when there are no older
        ones. A page may have fewer events than `limit`, or none, before that: a bounded number of events is scanned,
        back to `looked_at_ms`.

        `filters`: run, target, on_behalf_of, sponsor, class, status, severity; code (several with commas between).
        """
        ids = {"agent": agent, "task": task, "request": request, "lease": lease}
        return await self.get(
            "audit", "events", after=after, before=before, limit=limit, **{**ids, **(filters or {})}
        )

    async def tasks(
        self,
        *,
        status: str | None = None,
        agent: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> dict[str, Any]:
        """Return a page of the tasks that the caller may see: `{tasks: [{id, revision, state}], after, count}`.

        `status`: active or ended. Running tasks come in the order of their ends; other pages begin with those that end
        last. `count` is of all pages; continue with `after` until it is None.
        """
        page: dict[str, Any] = await self.get(
            "registry", "tasks", status=status, agent=agent, after=after, limit=limit
        )
        return page

    async def approval_history(
        self, agents: Sequence[str], *, since_ms: int, without: Sequence[str] = ()
    ) -> dict[str, list[dict[str, Any]]]:
        """Return how people answered requests of agents, at most 100, since a time: by agent, the latest first.

        Each is `{outcome, privileges, ttl_s, delivery, count}`; `outcome` is approved or denied, `privileges` are
        `target:verb:resource`. `without`: ids of requests, at most 1000, whose answers are left out.
        """
        found: dict[str, list[dict[str, Any]]] = (
            await self.get(
                "audit", "approval-history", agent=agents, since_ms=since_ms, **{"except": without}
            )
        )["agents"]
        return found

    async def export(
        self, filters: Filters | None = None, *, since_ms: int, until_ms: int, after: str | None = None
    ) -> Any:
        """Return a page of events by time and uid: `{events, until_ms, looked_at_ms, after}`.

        Continue with `after` until it is None. `events` are texts, byte for byte as on the topic. `filters` as for
        `events`, and agent, task, request, lease.
        """
        return await self.get(
            "audit", "export", since_ms=since_ms, until_ms=until_ms, after=after, **(filters or {})
        )

    async def model_usage(
        self,
        *,
        since_ms: int,
        until_ms: int | None = None,
        after: str | None = None,
        agent: str | None = None,
        task: str | None = None,
    ) -> Any:
        """Return a page of what requests to language models used. See `ringfence.client.reports.model_usage_report`.

        `{groups: [{day, agent, task, target, model, requests, tokens, input_tokens, output_tokens, not_stated}],
        until_ms, looked_at_ms, after}`; continue with `after` until it is None.
        """
        return await self.get(
            "audit",
            "model-usage",
            since_ms=since_ms,
            until_ms=until_ms,
            after=after,
            agent=agent,
            task=task,
        )

    async def actions(
        self,
        *,
        since_ms: int,
        until_ms: int | None = None,
        after: str | None = None,
        agent: str | None = None,
        target: str | None = None,
        step_ms: int | None = None,
    ) -> Any:
        """Return a page of actions through gateways, counted in groups. See `ActionReport`.

        With `step_ms` it also has `over_time`: `[{at_ms, access, count}]` of blocked actions, by steps of the period.

        `{groups, unknown_destinations, until_ms, looked_at_ms, after}`; continue with `after` until it is None.
        """
        return await self.get(
            "audit",
            "actions",
            since_ms=since_ms,
            until_ms=until_ms,
            after=after,
            agent=agent,
            target=target,
            step_ms=step_ms,
        )

    async def coverage(
        self,
        what: Literal["leases", "actions"],
        *,
        since_ms: int,
        until_ms: int | None = None,
        after: str | None = None,
        short_s: int | None = None,
    ) -> Any:
        """Return a page of leases or actions, counted by whether they can be traced to a human. See `Coverage`."""
        return await self.get(
            "audit", "coverage", what, since_ms=since_ms, until_ms=until_ms, after=after, short_s=short_s
        )

    def _token(self, service: Service) -> str:
        return api_token(self.key, service, now_ms=self._clock.now_ms())
