"""`target add --template`, and how what it gives is handed to a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from ringfence.backends.postgres_rights import RIGHTS
from ringfence.backends.ssh_rights import VERBS
from ringfence.cli.target import _settings, _template, _verbs
from ringfence.cli.target_templates import TEMPLATES
from ringfence.client.applying import applied, environment
from ringfence.client.replies import IssuedCredential


def test_the_templates_have_every_verb_there_is() -> None:
    assert TEMPLATES["postgres"].verbs.keys() == RIGHTS.keys()
    assert TEMPLATES["ssh"].verbs.keys() == set(VERBS)


def test_what_is_given_counts_instead() -> None:
    verbs = {one.verb: one.floor for one in _verbs(TEMPLATES["redis"], ["write=operator", "incr"])}
    assert verbs == {"read": "none", "write": "operator", "incr": "none"}
    assert [one.verb for one in _verbs(None, ["deploy"])] == ["deploy"]


def test_settings_keep_their_type() -> None:
    assert _settings(["connection_limit=2", "owned=keep"]) == {"connection_limit": 2, "owned": "keep"}


@pytest.mark.parametrize("text", ["owned", "=x", "kind=jwt", "audience=x", "a b=1"])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        _settings([text])


def test_neither_verb_nor_template() -> None:
    with pytest.raises(typer.BadParameter, match="template"):
        _verbs(None, [])
    with pytest.raises(typer.BadParameter, match="none of"):
        _template("mainframe")


def issued(kind: str, value: str) -> IssuedCredential:
    named = dict.fromkeys(
        ("lease_id", "request_id", "target", "task_id", "agent_id", "sponsor", "on_behalf_of"), "x"
    )
    given: dict[str, Any] = {"token_type": None, "expires_at": 1, "scope": (), "delivery": "agent", **named}
    return IssuedCredential(kind=kind, value=value, **given)


def test_libpq_is_told_what_the_url_says() -> None:
    url = "postgresql://role:p%40ss@db.example:5433/a%22b%2Fc?sslmode=verify-full"
    assert environment(issued("postgres", url)) == {
        "PGHOST": "db.example",
        "PGPORT": "5433",
        "PGUSER": "role",
        "PGPASSWORD": "p@ss",
        "PGDATABASE": 'a"b/c',
        "PGSSLMODE": "verify-full",
        "DATABASE_URL": url,
    }
    assert "PGSSLMODE" not in environment(issued("postgres", "postgresql://r:p@[::1]:1/d"))
    assert environment(issued("redis", "redis://u:p@h:1/0")) == {"REDIS_URL": "redis://u:p@h:1/0"}
    assert environment(issued("jwt", "token")) == {"RINGFENCE_CREDENTIAL": "token"}


def test_what_needs_no_file_is_in_the_environment_alone() -> None:
    with applied(issued("redis", "redis://u:p@h:1/0")) as variables:
        assert variables == {"REDIS_URL": "redis://u:p@h:1/0"}


def test_ssh_is_told_by_files_that_are_gone_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    value = {
        "url": "ssh://deploy@[::1]:2222/",
        "host_keys": ["ssh-ed25519 AAAA", "ssh-rsa BBBB"],
        "certificate": "a certificate",
        "private_key": "a key\n",
    }
    with applied(issued("ssh", json.dumps(value))) as variables:
        config = Path(variables["RINGFENCE_SSH_CONFIG"])
        assert config.parent.parent == tmp_path
        assert variables["GIT_SSH_COMMAND"] == variables["RSYNC_RSH"] == f"ssh -F {config}"
        written = {path.name: path.read_text() for path in config.parent.iterdir()}
        assert all(path.stat().st_mode & 0o077 == 0 for path in (config.parent, *config.parent.iterdir()))
        assert (written["key"], written["key-cert.pub"]) == ("a key\n", "a certificate\n")
        assert written["known_hosts"] == "x ssh-ed25519 AAAA\nx ssh-rsa BBBB\n"
        for line in ("Host x", "HostName ::1", "Port 2222", "User deploy", "StrictHostKeyChecking yes"):
            assert line in [said.strip() for said in written["config"].splitlines()]
        assert "a key" not in str(variables)
    assert list(tmp_path.iterdir()) == []
