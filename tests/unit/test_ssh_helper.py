"""The program on hosts that are reached by ssh, by itself: its KRL, its state, its configuration."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pwd
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ringfence.backends.ssh import host_helper as helper
from ringfence.backends.ssh.certificates import public_text
from ringfence.backends.ssh.host_helper import (
    Config,
    FailedError,
    RefusedError,
    Session,
    State,
    chosen,
    krl,
    principals,
    serial_of,
)

AUTHORITY = Ed25519PrivateKey.from_private_bytes(bytes(32))
LINE = public_text(AUTHORITY.public_key())
BLOB = base64.b64decode(LINE.split()[1])
LAST = 2**64 - 1
USERS: dict[str, Any] = {"deploy": {"read": {"say": ["/bin/echo", "hello"]}, "may": ["shell"]}, "web": {}}


def write_config(folder: Path, **more: Any) -> Path:
    path = folder / "config.json"
    given = {"authorities": [LINE], "state": str(folder / "state"), "users": USERS}
    path.write_text(json.dumps(given | more))
    path.chmod(0o644)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(str(write_config(tmp_path)))
    State(config).make()
    return config


def name() -> str:
    return f"test.example.{uuid.uuid4()}"


def me() -> Session:
    return Session.of(os.getpid())


# --- the KRL ----------------------------------------------------------------------------------------------------------


def ranges(document: bytes) -> list[tuple[int, int]]:
    """Those of a KRL of one authority."""
    section = document[8 + 4 + 8 + 8 + 8 + 4 + 4 + 1 + 4 :][4 + len(BLOB) + 4 :]
    assert len(section) % 21 == 0
    pieces = [section[at : at + 21] for at in range(0, len(section), 21)]
    assert all(piece[0] == 0x21 for piece in pieces)
    return [(int.from_bytes(piece[5:13], "big"), int.from_bytes(piece[13:], "big")) for piece in pieces]


@given(st.sets(st.integers(1, LAST) | st.sampled_from([1, 2, 3, LAST - 1, LAST]), max_size=20))
def test_krl_revokes_every_serial_but_the_announced(serials: set[int]) -> None:
    found = ranges(krl([BLOB], serials, 1, 1))
    assert all(first <= last for first, last in found)
    assert sum(last - first + 1 for first, last in found) == LAST - len(serials)
    assert not any(first <= serial <= last for serial in serials for first, last in found)


# --- the state --------------------------------------------------------------------------------------------------------


def revokes(config: Config, name: str) -> bool:
    document = (config.state / "krl").read_bytes()
    return any(first <= serial_of(name) <= last for first, last in ranges(document))


def test_announced_lease_is_valid_until_it_is_undone(config: Config) -> None:
    state, one, other = State(config), name(), name()
    assert ranges((config.state / "krl").read_bytes()) == [(1, LAST)]
    for lease in (one, other):
        state.announce(lease, "deploy", int(time.time()) + 60)
    state.announce(one, "deploy", int(time.time()) + 60)
    assert not revokes(config, one)
    assert set(state.standing("test.example")) == {one[-36:], other[-36:]}
    assert state.standing("test.exampl") == state.standing("example") == []
    state.undo(one)
    state.undo(one)
    assert revokes(config, one)
    assert not revokes(config, other)
    assert state.standing("test.example") == [other[-36:]]


def test_a_lease_is_for_one_user_and_a_serial_for_one_lease(config: Config, monkeypatch: Any) -> None:
    state, one = State(config), name()
    state.announce(one, "deploy", int(time.time()) + 60)
    with pytest.raises(RefusedError, match="another user"):
        state.announce(one, "web", int(time.time()) + 60)
    monkeypatch.setattr(helper, "serial_of", lambda name: 1)
    with pytest.raises(RefusedError, match="same serial"):
        state.announce(name(), "deploy", int(time.time()) + 60)


def test_a_krl_that_was_lost_or_changed_is_made_again(config: Config) -> None:
    one = name()
    State(config).announce(one, "deploy", int(time.time()) + 60)
    good = (config.state / "krl").read_bytes()
    (config.state / "krl").write_bytes(krl([BLOB], [serial_of(one), 5], 1, 1))
    State(config).undo(name())
    assert ranges((config.state / "krl").read_bytes()) == ranges(good)
    (config.state / "krl").unlink()
    State(config).make()
    assert ranges((config.state / "krl").read_bytes()) == ranges(good)


def test_only_root_reads_the_state(config: Config) -> None:
    State(config).announce(name(), "deploy", int(time.time()) + 60)
    assert all(path.stat().st_mode & 0o077 == 0 for path in [config.state, *config.state.rglob("*")])


# --- logging in -------------------------------------------------------------------------------------------------------


def fingerprint() -> str:
    return base64.b64encode(hashlib.sha256(BLOB).digest()).decode().rstrip("=")


def asks(config: Config, user: str, lease: str, **other: str) -> str:
    given = {
        "serial": str(serial_of(lease)),
        "key_id": f"ringfence:{lease}",
        "fingerprint": f"SHA256:{fingerprint()}",
    }
    return principals(config, user, **(given | other))


def test_certificate_admits_only_its_user_and_serial(config: Config) -> None:
    one, late = name(), name()
    State(config).announce(one, "deploy", int(time.time()) + 60)
    State(config).announce(late, "deploy", int(time.time()) - 1)
    assert asks(config, "deploy", one) == "ringfence:deploy"
    for user, lease, other in (
        ("web", one, {}),
        ("root", one, {}),
        ("ringfence-broker", one, {}),
        ("deploy", late, {}),
        ("deploy", name(), {}),
        ("deploy", one, {"serial": "0"}),
        ("deploy", one, {"serial": str(serial_of(late))}),
        ("deploy", one, {"key_id": one}),
        ("deploy", one, {"key_id": "ringfence:../../etc"}),
        ("deploy", one, {"fingerprint": "SHA256:another"}),
        ("deploy", one, {"fingerprint": ""}),
    ):
        assert asks(config, user, lease, **other) == "", (user, other)
    State(config).undo(late)
    assert (
        asks(config, "ringfence-broker", one, serial="0", key_id="ringfence") == "ringfence:ringfence-broker"
    )


def test_undo_refuses_new_logins_and_ends_open_sessions(config: Config) -> None:
    state, one = State(config), name()
    state.announce(one, "deploy", int(time.time()) + 60)
    tree = subprocess.Popen(["/bin/sh", "-c", "sleep 600 & sleep 600 & wait"], start_new_session=True)
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        assert state.login(one, "deploy", Session.of(tree.pid))
        children: list[int] = []
        while len(children) < 2:
            text = Path(f"/proc/{tree.pid}/task/{tree.pid}/children").read_text()
            children = [int(word) for word in text.split()]
        state.undo(one)
        assert not any(helper._process(pid) for pid in (tree.pid, *children))
        assert helper._process(bystander.pid)
        assert not state.login(one, "deploy", me())
        assert state.standing("test.example") == []
    finally:
        for process in (tree, bystander):
            process.kill()
            process.wait()


def test_processes_outside_the_tree_are_found_by_session_scope(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(helper, "_PROC", str(tmp_path / "proc"))
    monkeypatch.setattr(helper, "_CGROUPS", str(tmp_path / "cgroups"))
    for pid, path in ((7, "/user.slice/user-1000.slice/session-c3.scope"), (8, "/system.slice/ssh.service")):
        (tmp_path / "proc" / str(pid)).mkdir(parents=True)
        (tmp_path / "proc" / str(pid) / "cgroup").write_text(f"1:name=systemd:/x\n0::{path}\n")
        (tmp_path / f"cgroups{path}").mkdir(parents=True)
        (tmp_path / f"cgroups{path}" / "cgroup.procs").write_text("7\n9\n")
    assert helper._scope(7) == [7, 9]
    assert helper._scope(8) == []  # of everybody
    assert helper._scope(9) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start what runs as somebody else")
def test_processes_of_an_agents_only_user_end_with_the_last_lease(tmp_path: Path, monkeypatch: Any) -> None:
    users = {"deploy": {"agents_only": True}, "web": {"agents_only": False}}
    numbers = {"deploy": 60_101, "web": 60_102}
    monkeypatch.setattr(
        pwd, "getpwnam", lambda user: pwd.struct_passwd(("", "", numbers[user], 1, "", "", ""))
    )
    state = State(Config(str(write_config(tmp_path, users=users))))
    state.make()
    one, other = name(), name()
    left = {user: subprocess.Popen(["sleep", "600"], user=number) for user, number in numbers.items()}
    try:
        for lease in (one, other):
            state.announce(lease, "deploy", int(time.time()) + 60)
        state.undo(one)
        assert left["deploy"].poll() is None
        state.undo(other)
        assert left["deploy"].wait(10) == -9
        assert left["web"].poll() is None
        numbers["deploy"] = 0
        with pytest.raises(FailedError, match="root"):
            state.undo(other)
        del numbers["deploy"]
        with pytest.raises(FailedError, match="no such user"):
            state.undo(other)
    finally:
        for process in left.values():
            process.kill()
            process.wait()


def test_a_number_that_belongs_to_another_process_now_is_left_alone(config: Config) -> None:
    state, one = State(config), name()
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        now = Session.of(bystander.pid)
        for was in (
            Session(now.pid, now.started - 1, now.boot),
            Session(now.pid, now.started, "another boot"),
        ):
            state.announce(one, "deploy", int(time.time()) + 60)
            assert state.login(one, "deploy", was)
            state.undo(one)
        assert bystander.poll() is None
        assert state.standing("test.example") == []
    finally:
        bystander.kill()
        bystander.wait()


def test_surviving_process_is_not_reported_as_ended(config: Config, monkeypatch: Any) -> None:
    state, one = State(config), name()
    monkeypatch.setattr(helper, "_END_WITHIN_S", 0.05)
    monkeypatch.setattr(helper, "_signal", lambda *_: None)
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        state.announce(one, "deploy", int(time.time()) + 60)
        assert state.login(one, "deploy", Session.of(bystander.pid))
        with pytest.raises(FailedError, match="do not end"):
            state.undo(one)
        assert state.standing("test.example") == [one[-36:]]
        assert revokes(config, one)
        monkeypatch.undo()
        state.undo(one)
        assert state.standing("test.example") == []
    finally:
        bystander.kill()
        bystander.wait()


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granted", "asked", "runs"),
    [
        (["read:a"], "", ["read", "a"]),
        (["read:a"], "read a", ["read", "a"]),
        (["read:a", "write:a"], "write a", ["write", "a"]),
        (["read:a", "write:a"], "", None),
        (["read:a"], "write a", None),
        (["read:a"], "read a ", None),
        (["read:a"], "read a; id", None),
        (["read:a"], "read:a", None),
        ([], "", None),
        ([], "sh", None),
    ],
)
def test_requested_command_must_be_granted(granted: list[str], asked: str, runs: list[str] | None) -> None:
    assert chosen(granted, asked) == runs


def test_helper_executes_the_command_that_the_administrator_named(tmp_path: Path) -> None:
    argv = [sys.executable, "-IS", helper.__file__, "--config", str(write_config(tmp_path)), "run", "deploy"]

    def run(*granted: str, asked: str = "") -> subprocess.CompletedProcess[str]:
        env = {"SSH_ORIGINAL_COMMAND": asked}
        return subprocess.run([*argv, *granted], env=env, capture_output=True, text=True, check=False)

    assert run("read:say").stdout == "hello\n"
    refused = run("read:say", asked="read other")
    assert (refused.returncode, refused.stdout) == (126, "")
    assert "refused: this credential runs: read say" in refused.stderr
    gone = run("read:gone")
    assert gone.returncode == 1
    assert "there is no command read gone any more" in gone.stderr


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"authorities": ["nothing"]},
        {"authorities": None},
        {"users": {"ringfence-broker": {}}},
        {"users": {"Deploy": {}}},
        {"users": {"deploy": {"run": {}}}},
        {"users": {"deploy": {"may": ["everything"]}}},
        {"users": {"deploy": {"agents_only": "yes"}}},
        {"users": {"deploy": {"read": {"a b": ["/bin/a"]}}}},
        {"users": {"deploy": {"read": {"a": "/bin/a"}}}},
        {"users": {"deploy": {"read": {"a": ["a"]}}}},
        {"users": {"deploy": {"read": {"a": []}}}},
        {"users": []},
    ],
)
def test_invalid_host_configuration_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(FailedError, match="is wrong"):
        Config(str(write_config(tmp_path, **wrong)))


def test_helper_configuration_writable_by_others_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.chmod(0o666)
    with pytest.raises(FailedError, match="can be changed by others"):
        Config(str(path))
    with pytest.raises(FailedError, match="cannot read"):
        Config(str(tmp_path / "nowhere"))
