"""HTTP API to read an agent's ceiling, holdings and usage, and a narrower ceiling that would suffice."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.base.clock import Clock
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.policy.agents.holdings import Holdings
from ringfence.policy.agents.usage import DAY_S, WINDOW_DAYS, KeyLastSeen, narrower, verbs_of


class UsageApi:
    """One HTTP route. Every replica knows the leases of all agents."""

    def __init__(
        self,
        directory: Directory,
        authenticator: Authenticator,
        holdings: Holdings,
        key_last_seen: KeyLastSeen,
        clock: Clock,
    ) -> None:
        self._directory = directory
        self._authenticator = authenticator
        self._clock = clock
        self._holdings = holdings
        self._key_last_seen = key_last_seen

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [Route("/v1/agents/{agent_id}/usage", self._usage)]

    async def _usage(self, request: Request) -> Response:
        caller = self._authenticator.authenticate(request)
        try:
            entry = self._directory.agent(request.path_params["agent_id"])
        except ChainError:
            entry = None
        if entry is None or not caller.may_see_agent_of(entry.state.sponsor):
            raise NotFoundError("no agent with this id that you could see")
        agent, now_s = entry.state, self._clock.now_ms() // 1000
        used = self._holdings.used(agent.agent_id, now_s)
        held = self._holdings.held(agent.agent_id, now_s)
        used_verbs = {(one.target, one.verb) for one in used}
        used_verbs |= {(p["target"], verb) for lease in held for p in lease["scope"] for verb in p["verbs"]}
        unused = sorted(verbs_of(agent.ceiling) - used_verbs)
        narrowed = narrower(agent.ceiling, used_verbs)
        return JSONResponse(
            {
                "agent_id": agent.agent_id,
                "registered_at": entry.record.commands[0].appended_at_ms // 1000,
                "since": (now_s // DAY_S - WINDOW_DAYS + 1) * DAY_S,
                "ceiling": [permission.model_dump(mode="json") for permission in agent.ceiling],
                "used": [
                    {
                        "target": one.target,
                        "verb": one.verb,
                        "first_used": one.first_s,
                        "last_used": one.last_s,
                        "days": one.days,
                    }
                    for one in sorted(used, key=lambda one: (one.target, one.verb))
                ],
                "never_used": [{"target": target, "verb": verb} for target, verb in unused],
                "held": held,
                "keys_seen": [
                    {"kid": kid, "last_seen_ms": at_ms}
                    for kid, at_ms in sorted(self._key_last_seen.of(agent.agent_id).items())
                ],
                "narrower": [p.model_dump(mode="json") for p in narrowed] if unused else None,
            }
        )
