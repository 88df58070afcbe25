"""The actions of requests to Git servers."""

from __future__ import annotations

from ringfence.gateway.contract import GitRequest
from ringfence.gateway.decision.targets import CompiledTarget
from ringfence.gateway.domain import Leases, Sender
from ringfence.messages.base import Permission
from ringfence.model.http_targets import Action
from ringfence.model.scope.scope import intersect


def git_actions(
    request: GitRequest, target: CompiledTarget, sender: Sender, leases: Leases
) -> tuple[Action, ...] | None:
    """The actions of a request, which all have to be allowed; None if the target has no rule for one.

    A client that asks for the refs that it may push to, or that probes, does not yet say to which it will. It may do so
    if the sender may push to any.
    """
    if request.commands is not None and request.commands.updates:
        return target.map.git_actions(request.endpoint, request.commands.updates)
    if request.endpoint.service == "git-upload-pack":
        return target.map.git_actions(request.endpoint, ())
    offers = target.map.git_offers(request.endpoint)
    return (_allowed_offer(offers, target.state.target_id, sender, leases),) if offers else None


def _allowed_offer(offers: tuple[Action, ...], target_id: str, sender: Sender, leases: Leases) -> Action:
    """The part of an offer that a lease of the sender allows, whose resource is a glob; else the first offer."""
    for lease in leases.usable(sender.agent_id, sender.task_id, target_id):
        if sender.lease_id not in (None, lease.lease_id):
            continue
        for offer in offers:
            wanted = Permission(target=target_id, verbs=(offer.verb,), resources=(offer.resource,))
            for shared in intersect((wanted,), lease.scope):
                return Action(offer.verb, shared.resources[0])
    return offers[0]
