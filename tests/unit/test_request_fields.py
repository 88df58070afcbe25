"""Where each field of a request for a credential goes: a new one is known to everybody who has to know of it.

Add it to `WHERE` with the name that it has in each place, or with None and a reason where it has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields

import pytest

from ringfence.audit.memory import RequestFacts
from ringfence.cli.commands.request import request as request_command
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.history_comparison import PendingApproval
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.credential import CredentialRequest
from ringfence.policy.domain import REQUEST_FIELDS

ALL = "sdk", "command", "policy", "approver", "audit"
OWN = CredentialRequest.model_fields.keys() - ExpiringClaims.model_fields.keys()


def told(**names: str | None) -> Mapping[str, str | None]:
    assert names.keys() == set(ALL)
    return names


WHERE: Mapping[str, Mapping[str, str | None]] = {
    "task_id": told(sdk="task", command="task", policy="task_id", approver="task_id", audit="task"),
    "scope": told(sdk="scope", command="allow", policy="scope", approver="scope", audit="permissions"),
    "ttl_s": told(sdk="ttl_s", command="ttl", policy="ttl_s", approver="requested_ttl_s", audit="ttl_s"),
    "delivery": told(
        sdk="delivery", command="delivery", policy="delivery", approver="delivery", audit="delivery"
    ),
    "reason": told(sdk="reason", command="reason", policy="reason", approver="reason", audit="reason"),
    "break_glass": told(
        sdk="break_glass", command="break_glass", policy="break_glass", approver="break_glass", audit="break_glass"
    ),
    # Nobody chooses it, and it says nothing of what is wanted.
    "reply_key": told(sdk=None, command=None, policy=None, approver=None, audit=None),
    "process": told(sdk=None, command=None, policy=None, approver=None, audit=None),
    # The SDK has it from the registry. Policy and audit tell the instance, which follows from it.
    "enrolment": told(sdk=None, command=None, policy=None, approver=None, audit="instance"),
}  # fmt: skip


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


KNOWN: Mapping[str, set[str]] = {
    "sdk": parameters(Agent.request_scope),
    "command": parameters(request_command),
    "policy": set(REQUEST_FIELDS),
    "approver": {field.name for field in fields(PendingApproval)},
    "audit": {field.name for field in fields(RequestFacts)},
}


def test_each_field_says_where_it_goes() -> None:
    assert WHERE.keys() == OWN


@pytest.mark.parametrize("place", ALL)
def test_each_place_has_the_fields_that_go_there(place: str) -> None:
    assert {names[place] for names in WHERE.values() if names[place]} <= KNOWN[place]


def test_policy_is_told_what_is_said_here_and_nothing_else() -> None:
    assert set(REQUEST_FIELDS) == {name for name, places in WHERE.items() if places["policy"]}


@pytest.mark.parametrize("way", [Agent.request, Agent.credential])
def test_the_sdk_takes_them_in_each_of_its_ways(way: object) -> None:
    instead = {"scope": {"target", "verbs", "resources"}}
    for names in WHERE.values():
        name = names["sdk"]
        assert name is None or instead.get(name, {name}) <= parameters(way)
