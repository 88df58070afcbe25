"""A string, or one item, where the SDK takes a list: refused, with what to write, before anything is sent."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import ringfence
from ringfence import (
    Administrator,
    Agent,
    AttestationSelector,
    BackendSettings,
    ClientSettings,
    Grantor,
    InvalidCallError,
    Permission,
    RequestMapError,
    RequestRule,
    SigningKey,
    VerbFloor,
)
from ringfence.client.admin.provisioner import Provisioner
from ringfence.client.connection import Connection
from ringfence.messages.run import RunLimits

SETTINGS = ClientSettings(trust_domain="test.example", trust_root="x" * 43)
SCOPE = (Permission(target="staging", verbs=("read",), resources=("env/x",)),)
KEY = SigningKey.generate("spiffe://test.example/agent/bot")
BACKEND = BackendSettings(kind="jwt")
LIMITS = RunLimits(memory_bytes=2**31, cpu_millis=1000, pids=256)
TASK = "6f1c1fd6-7d5f-5d0f-8e0c-2b0f3c1d2e3f"


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Connection]:
    """Connections that have nothing to connect to, and fail the test that sends something."""

    async def publish(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was sent")

    monkeypatch.setattr(Connection, "publish", publish)
    monkeypatch.setattr(Connection, "follow", publish)
    return lambda who: Connection(SigningKey.generate(f"spiffe://test.example/{who}"), SETTINGS)


Call = Callable[[Any, Any], Awaitable[Any] | Any]
AGENT: dict[str, tuple[str, Call]] = {
    "request": ("verbs", lambda a, v: a.request(task=TASK, target="t", verbs=v, resources=["x"], reason="r")),
    "request, resources": (
        "resources",
        lambda a, v: a.request(task=TASK, target="t", verbs=["read"], resources=v, reason="r"),
    ),
    "credential": (
        "verbs",
        lambda a, v: a.credential(task=TASK, target="t", verbs=v, resources=["x"], reason="r").__aenter__(),
    ),
    "credential, resources": (
        "resources",
        lambda a, v: a.credential(
            task=TASK, target="t", verbs=["read"], resources=v, reason="r"
        ).__aenter__(),
    ),
    "request_scope": ("scope", lambda a, v: a.request_scope(task=TASK, scope=v, reason="r")),
    "delegate": ("scope", lambda a, v: a.delegate(task=TASK, to="b", purpose="p", scope=v, ends_in_s=9)),
}
ADMINISTRATOR: dict[str, tuple[str, Call]] = {
    "set_user, roles": ("roles", lambda a, v: a.set_user("u", name="U", roles=v)),
    "set_user, keys": ("keys", lambda a, v: a.set_user("u", name="U", keys=v)),
    "set_user, entitlements": ("entitlements", lambda a, v: a.set_user("u", name="U", entitlements=v)),
    "end_user_key": (
        "holds", lambda a, v: a.end_user_key("u", "k", reason="r", compromised=True, since_ms=0, holds=v)
    ),
    "set_provisioner": ("keys", lambda a, v: a.set_provisioner("p", name="P", keys=v, delegation=None)),
    "register_agent, keys": (
        "keys", lambda a, v: a.register_agent("b", description="d", keys=v, ceiling=SCOPE)
    ),
    "register_agent, ceiling": (
        "ceiling", lambda a, v: a.register_agent("b", description="d", keys=[KEY], ceiling=v)
    ),
    "register_agent, attestation": (
        "attestation",
        lambda a, v: a.register_agent("b", description="d", keys=[KEY], ceiling=SCOPE, attestation=v),
    ),
    "set_attestation": ("attestation", lambda a, v: a.set_attestation("b", v)),
    "rotate_key": ("replaces", lambda a, v: a.rotate_key("b", KEY, replaces=v)),
    "set_ceiling": ("ceiling", lambda a, v: a.set_ceiling("b", v)),
    "set_target, verbs": (
        "verbs", lambda a, v: a.set_target("t", description="d", verbs=v, backend=BACKEND)
    ),
    "set_target, requests": (
        "requests",
        lambda a, v: a.set_target(
            "t", description="d", verbs=[VerbFloor(verb="read")], backend=BACKEND, requests=v
        ),
    ),
    "set_target, keys": (
        "keys",
        lambda a, v: a.set_target(
            "t", description="d", verbs=[VerbFloor(verb="read")], backend=BACKEND, keys=v
        ),
    ),
    "terms": ("scope", lambda a, v: a.terms("b", purpose="p", scope=v, ends_in_s=9)),
    "assign_task": ("scope", lambda a, v: a.assign_task("b", purpose="p", scope=v, ends_in_s=9)),
    "unknown_names": ("scope", lambda a, v: a.unknown_names(v)),
    "key_records": ("keys", lambda a, v: a.key_records(v)),
    "order_run, command": (
        "command", lambda a, v: a.order_run(TASK, pool="p", command=v, limits=LIMITS, ttl_s=9)
    ),
    "order_run, mounts": (
        "mounts", lambda a, v: a.order_run(TASK, pool="p", command=["x"], limits=LIMITS, ttl_s=9, mounts=v)
    ),
}  # fmt: skip
GRANTOR: dict[str, tuple[str, Call]] = {
    "propose": ("scope", lambda a, v: a.propose(TASK, v, count=1, lasts_s=60)),
}
PROVISIONER: dict[str, tuple[str, Call]] = {"link_groups": ("groups", lambda a, v: a.link_groups(v))}
ALL = [
    pytest.param(cls, who, argument, call, id=f"{cls.__name__}.{name}")
    for cls, who, calls in (
        (Agent, "agent/bot", AGENT),
        (Administrator, "user/maria", ADMINISTRATOR),
        (Grantor, "user/maria", GRANTOR),
        (Provisioner, "user/hr", PROVISIONER),
    )
    for name, (argument, call) in calls.items()
]


@pytest.mark.parametrize(("cls", "who", "argument", "call"), ALL)
@pytest.mark.parametrize(
    "wrong",
    ["read", b"read", SCOPE[0], {"verb": "read"}, 7, [b"read"], [None], None],
    ids=lambda wrong: type(wrong).__name__,
)
async def test_argument_that_is_no_list_is_refused_before_sending(
    cls: Any, who: str, argument: str, call: Call, wrong: Any, connect: Callable[..., Connection]
) -> None:
    if wrong is None and argument == "replaces":
        return  # all keys
    with pytest.raises(InvalidCallError) as error:
        result = call(cls(connect(who)), wrong)
        if inspect.isawaitable(result):
            await result
    assert f"write {argument}=[" in str(error.value)


async def test_the_message_repeats_a_string_as_it_is_to_be_written(
    connect: Callable[..., Connection],
) -> None:
    agent = Agent(connect("agent/bot"))
    with pytest.raises(InvalidCallError, match=r"^verbs is a list of strings: write verbs=\['read'\]$"):
        await agent.request(task=TASK, target="t", verbs="read", resources=["x"], reason="r")


async def test_condition_on_the_stronger_verb_is_refused_before_anything_is_sent(
    connect: Callable[..., Connection],
) -> None:
    weak, strong = VerbFloor(verb="push"), VerbFloor(verb="force", floor="operator")
    force = RequestRule(method="POST", path="/x", verb="force", resource="x", query={"force": ("true",)})
    push = RequestRule(method="POST", path="/x", verb="push", resource="x")
    with pytest.raises(RequestMapError, match="weaker verb"):
        await Administrator(connect("user/olga")).set_target(
            "t", description="d", verbs=[weak, strong], backend=BACKEND, requests=[force, push]
        )


async def test_a_key_that_stands_for_a_list_is_not_repeated(connect: Callable[..., Connection]) -> None:
    administrator = Administrator(connect("user/maria"))
    with pytest.raises(InvalidCallError) as error:
        administrator.key_records("private-key-material")  # type: ignore[arg-type]
    assert "private-key-material" not in str(error.value)


async def test_any_iterable_is_a_list(connect: Callable[..., Connection]) -> None:
    administrator = Administrator(connect("user/maria"))
    terms = administrator.terms("b", purpose="p", scope=iter(SCOPE), ends_in_s=9)  # type: ignore[arg-type]
    assert terms.scope == SCOPE
    assert administrator.key_records({KEY: None}.keys())[0].kid == KEY.kid  # type: ignore[arg-type]


LISTS = {"Sequence", "list", "tuple", "Iterable", "Collection", "set", "frozenset"}


def _list_parameters() -> Iterator[tuple[str, str]]:
    for name in ringfence.__all__:
        cls = getattr(ringfence, name)
        if not inspect.isclass(cls) or not cls.__module__.startswith("ringfence.client."):
            continue
        if issubclass(cls, Exception):
            continue
        for method, value in inspect.getmembers(cls, inspect.isfunction):
            if method.startswith("_"):
                continue
            for parameter in inspect.signature(value).parameters.values():
                if str(parameter.annotation).partition("[")[0] in LISTS:
                    yield f"{name}.{method}", parameter.name


def test_every_public_method_that_takes_a_list_is_tried_here() -> None:
    tried = {(str(one.id).partition(",")[0], one.values[2]) for one in ALL}
    assert {found for found in _list_parameters() if found not in tried} == set()
    assert len(set(_list_parameters())) >= 20


def test_items_of_a_message_are_checked_by_the_message() -> None:
    # Pydantic's own refusal, before there is anything that could be sent.
    for wrong in (
        lambda: Permission(target="t", verbs="read", resources=("x",)),  # type: ignore[arg-type]
        lambda: RequestRule(method="GET", path="/x", verb="read", body="x"),  # type: ignore[arg-type, call-arg]
        lambda: AttestationSelector(issuer="x", claims="x"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError):
            wrong()
