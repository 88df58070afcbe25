"""What a scope means at a host, without one."""

from __future__ import annotations

import pytest

from ringfence.backends.ssh.certificates import MAX_COMMANDS, AllowedCommands, Rights, allowed, plan
from ringfence.backends.target_settings import InexactError
from ringfence.messages.base import Permission

THERE: Rights = {
    "deploy": {"read": ["log", "log.old", "status"], "write": ["restart"], "may": ["shell", "terminal"]},
    "web": {"read": ["status"], "write": [], "may": []},
}


def can(verbs: str, *resources: str) -> Permission:
    return Permission(target="files", verbs=tuple(verbs.split()), resources=resources)


def meant(*scope: Permission, there: Rights = THERE) -> AllowedCommands:
    return allowed(plan(scope), there)


def test_commands_are_those_that_are_there_and_meant() -> None:
    assert meant(can("read", "deploy/status")).commands == (("read", "status"),)
    assert meant(can("read", "deploy/log*")).commands == (("read", "log"), ("read", "log.old"))
    assert meant(can("read write", "deploy/**")).commands == (
        ("read", "log"), ("read", "log.old"), ("read", "status"), ("write", "restart"),
    )  # fmt: skip


def test_ways_are_rights_on_the_user() -> None:
    assert meant(can("shell", "deploy")) == AllowedCommands("deploy", (), frozenset({"shell"}))
    both = meant(can("write", "deploy/restart"), can("terminal", "deploy"))
    assert both == AllowedCommands("deploy", (("write", "restart"),), frozenset({"terminal"}))
    assert meant(can("shell terminal", "deploy/**")).login_kinds == {"shell", "terminal"}


@pytest.mark.parametrize(
    ("scope", "why"),
    [
        ((), "empty"),
        ((can("deploy", "deploy/status"),), "the verb 'deploy' is none"),
        ((can("read", "deploy"),), "right on a command"),
        ((can("read", "deploy/a/b"),), "right on a command"),
        ((can("shell", "deploy/status"),), "right on a user"),
        ((can("read", "*/status"),), "names no user"),
        ((can("read", "**"),), "names no user"),
        ((can("read", "Deploy/status"),), "no name of a user"),
        ((can("read", "deploy/-x"),), "no name of a command"),
        ((can("read", "deploy/status"), can("read", "web/status")), "one user"),
        ((can("read", "deploy/status"), can("shell", "deploy")), "shell is every command"),
        ((can("read shell", "deploy/**"),), "shell is every command"),
    ],
)
def test_scope_that_no_certificate_can_express_is_refused(scope: tuple[Permission, ...], why: str) -> None:
    with pytest.raises(InexactError, match=why):
        plan(scope)


@pytest.mark.parametrize(
    ("permission", "why"),
    [
        (can("read", "nobody/status"), "no certificate can be for user 'nobody'"),
        (can("read", "deploy/restart"), "means no command"),
        (can("write", "web/*"), "means no command"),
        (can("forward", "deploy"), "does not allow it"),
        (can("shell", "web"), "does not allow it"),
    ],
)
def test_permission_that_the_host_lacks_is_refused(permission: Permission, why: str) -> None:
    with pytest.raises(InexactError, match=why):
        meant(permission)


def test_too_much_at_a_time() -> None:
    many = {"deploy": {"read": [f"c{n}" for n in range(MAX_COMMANDS + 1)], "write": [], "may": []}}
    with pytest.raises(InexactError, match="ask for less"):
        meant(can("read", "deploy/*"), there=many)
