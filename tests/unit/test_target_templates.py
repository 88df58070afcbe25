"""`target add --template`, and how what it gives is handed to a program."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from ringfence.backends.postgres_rights import RIGHTS
from ringfence.cli.target import _settings, _template, _verbs
from ringfence.cli.target_templates import TEMPLATES
from ringfence.client.applying import environment
from ringfence.client.replies import IssuedCredential


def test_the_template_of_postgres_has_every_verb_there_is() -> None:
    assert TEMPLATES["postgres"].verbs.keys() == RIGHTS.keys()


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
