"""Messages that people sign: each has one composition, one topic and key, and the same records wherever it is shown."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, cast

import pytest

from ringfence.client.errors import ApiError
from ringfence.client.passkeys import questions
from ringfence.client.signed_messages import compose, key_of, topic_of
from ringfence.console.commands import KINDS, Asking, Commands
from ringfence.console.questions import Draft, Questions
from ringfence.console.security import SealedValues
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import COMMANDS, AgentSuspend, AgentTransferConsent, TaskAssign, TaskDelegate
from ringfence.messages.topics import APPROVAL_RESPONSE, REGISTRY_COMMAND, REVOCATION_REQUEST
from tests.support.in_memory_registry import TD, InMemoryRegistry

STAMP: dict[str, Any] = {"iss": f"spiffe://{TD}/user/sam", "aud": TD, "iat": 1000, "exp": 1120, "jti": "j"}
ID = "2f0ee2a6-93a6-4d0c-8f0e-b4a0b1f4b6a1"


def test_a_message_that_does_not_expire_has_no_exp_and_others_end_no_later_than_what_they_are_about() -> None:
    suspend: dict[str, Any] = {"agent_id": "bot", "reason": "odd"}
    assert compose(AgentSuspend, STAMP, **suspend).exp == 1120
    assert compose(AgentSuspend, STAMP, until=1050, **suspend).exp == 1050
    assert compose(AgentSuspend, STAMP, until=2000, **suspend).exp == 1120
    revocation = compose(RevocationRequest, STAMP, kind="revocation", lease_id=ID, reason="odd")
    assert "exp" not in revocation.model_dump()


@pytest.mark.parametrize("model", COMMANDS, ids=lambda model: model.typ)
def test_a_registry_command_is_keyed_by_its_subject(model: type[Claims]) -> None:
    subject = model.typ.partition(".")[0]
    command = model.model_construct(**{**STAMP, f"{subject}_id": "x"})
    own = message_id(STAMP["iss"], "j") if model in (TaskAssign, TaskDelegate) else "x"
    assert (topic_of(model), key_of(command)) == (REGISTRY_COMMAND, own)


@pytest.mark.parametrize(
    ("selector", "key"),
    [
        ({"agent_id": "bot"}, "bot"),
        ({"task_id": ID}, ID),
        ({"sponsor": "sam"}, "sam"),
        ({"target_id": "staging"}, "staging"),
        ({"user_id": "maria"}, "maria"),
        ({"all": True}, "all"),
    ],
    ids=str,
)
def test_a_revocation_is_keyed_by_its_condition(selector: Mapping[str, Any], key: str) -> None:
    claims = compose(RevocationRequest, STAMP, kind="revocation", selector=selector, reason="odd")
    assert (topic_of(RevocationRequest), key_of(claims)) == (REVOCATION_REQUEST, key)


def test_a_consent_is_sent_nowhere() -> None:
    assert topic_of(AgentTransferConsent) is None
    assert {topic_of(kind.model) for kind in KINDS.values()} == {
        REGISTRY_COMMAND, REVOCATION_REQUEST, APPROVAL_RESPONSE, None
    }  # fmt: skip


class Reads:
    """The registry's API, over the records of an organisation."""

    def __init__(self, registry: InMemoryRegistry) -> None:
        self.registry = registry

    async def signed_record(self, kind: Any, id: str) -> Any:
        entry = self.registry.directory.entry(kind, id)
        if entry is None:
            raise ApiError(f"there is no {kind} {id}", status=404)
        return {"record": entry.compact.decode()}


@pytest.fixture
def registry() -> InMemoryRegistry:
    made = InMemoryRegistry()
    made.organisation()
    made.give(made.register("sam", "deploy-bot", "sam"))
    return made


async def draft_of(registry: InMemoryRegistry, kind: str, form: Mapping[str, str]) -> Draft:
    async def publish(*sent: object) -> None:
        pytest.fail("a draft was sent")

    key = SigningKey.generate(f"spiffe://{TD}/service/console")
    asked = Questions(SealedValues(lambda: key), registry.trust, registry.clock, TD, publish)
    commands = Commands(asked, registry.trust, cast(Any, None))
    asking = Asking(cast(Any, Reads(registry)), "sam", form, asked.now_s())
    return await KINDS[kind].compose(commands, asking)


@pytest.mark.parametrize(
    ("kind", "by", "records"),
    [
        ("suspend", "agent", 2),
        ("resume", "agent", 2),
        ("transfer", "agent", 2),
        ("end-task", "task", 2),
        ("revoke-all", "task", 2),
        ("revoke-all", "agent", 1),
        ("revoke-all", "nothing that there is", 1),
    ],
)
async def test_console_and_sdk_show_a_command_by_the_same_records(
    registry: InMemoryRegistry, kind: str, by: str, records: int
) -> None:
    change = registry.give(registry.assign("sam", "deploy-bot"))
    assert change is not None
    ids = {"agent": "deploy-bot", "task": cast(Any, change.state).task_id}
    form = {"id": ids.get(by, str(uuid.uuid4())), "by": by if by in ids else "task", "reason": "odd"}
    draft = await draft_of(registry, kind, form | {"sponsor": "olga"})
    asked = questions.compose("sam", draft.claims, registry.directory, registry.trust, evidence={})
    assert draft.evidence == json.loads(asked)["evidence"]
    assert len(draft.evidence["records"]) == records
    assert draft.key == key_of(draft.claims)


async def test_a_task_that_there_is_not_is_ended_by_nobody(registry: InMemoryRegistry) -> None:
    with pytest.raises(ApiError, match="there is no task"):
        await draft_of(registry, "end-task", {"id": str(uuid.uuid4()), "reason": "odd"})
