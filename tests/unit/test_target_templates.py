"""`target add --template`, and how what it gives is handed to a program."""

from __future__ import annotations

import json
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import typer

from ringfence.backends import mysql
from ringfence.backends.postgres.privileges import RIGHTS
from ringfence.backends.ssh.certificates import VERBS
from ringfence.cli.commands.target import _merge_verbs, _parse_request_rule, _parse_settings, _template
from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.client.agent.credentials import IssuedCredential, Secret, applied, environment
from ringfence.model.http_targets import Action, RequestMap
from ringfence.model.target_settings import HttpSettings


def test_the_templates_have_every_verb_there_is() -> None:
    assert TEMPLATES["postgres"].verbs.keys() == RIGHTS.keys()
    assert TEMPLATES["mysql"].verbs.keys() == mysql.RIGHTS.keys()
    assert TEMPLATES["ssh"].verbs.keys() == set(VERBS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_verb_of_a_map_has_a_floor_and_every_floor_a_use(name: str) -> None:
    template = TEMPLATES[name]
    RequestMap(template.requests)
    if template.requests:
        assert {rule.verb for rule in template.requests} == template.verbs.keys()


def test_the_template_of_github_is_understood_by_its_backend() -> None:
    HttpSettings.model_validate(dict(TEMPLATES["github-api"].settings))


REPO = "/repos/octo/hello"


@pytest.mark.parametrize(
    ("method", "path", "verb"),
    [
        ("GET", "", "metadata:read"),
        ("HEAD", "", "metadata:read"),
        ("GET", "/contents/src/main.py?ref=main", "contents:read"),
        ("GET", "/contents/.github/workflows/ci.yml", "contents:read"),
        ("GET", "/git/trees/main", "contents:read"),
        ("PUT", "/contents/src/main.py", "contents:write"),
        ("PUT", "/contents/src/.github/workflows/ci.yml", "contents:write"),
        ("PUT", "/contents/.github/workflows/ci.yml", "workflows:write"),
        ("PUT", "/contents/%2Egithub/workflows/ci.yml", "workflows:write"),
        ("PUT", "/contents/.github/%77orkflows/deep/ci.yml", "workflows:write"),
        ("DELETE", "/contents/.github/workflows/ci.yml", "workflows:write"),
        ("PUT", "/contents/.github/actions/build/action.yml", "workflows:write"),
        ("PUT", "/contents/.github/CODEOWNERS", "workflows:write"),
        ("POST", "/git/trees", "git:write"),
        ("POST", "/git/refs", "git:write"),
        ("PATCH", "/git/refs/heads/main", "git:write"),
        ("POST", "/merges", "git:write"),
        ("PUT", "/pulls/7/update-branch", "git:write"),
        ("PUT", "/pulls/7/merge", "pulls:merge"),
        ("GET", "/pulls/7/files", "pulls:read"),
        ("POST", "/pulls", "pulls:write"),
        ("POST", "/issues/7/comments", "issues:write"),
        ("GET", "/actions/runs/7/jobs", "actions:read"),
        ("POST", "/actions/workflows/ci.yml/dispatches", "actions:run"),
        ("POST", "/dispatches", "actions:run"),
    ],
)
def test_github_request_maps_to_its_verb(method: str, path: str, verb: str) -> None:
    action = RequestMap(TEMPLATES["github-api"].requests).action(method, REPO + path)
    assert action is not None
    assert action.verb == verb
    assert action.resource.startswith("repos/octo/hello")


def test_a_review_at_github_that_may_approve_is_an_approval() -> None:
    github = RequestMap(TEMPLATES["github-api"].requests)
    bodies = {
        b'{"event": "COMMENT", "body": "hm"}': "pulls:write",
        b'{"event": "REQUEST_CHANGES"}': "pulls:write",
        b'{"event": "APPROVE"}': "pulls:approve",
        b'{"event": "approve"}': "pulls:approve",
        b'{"body": "later"}': "pulls:approve",
    }
    for path in ("/pulls/7/reviews", "/pulls/7/reviews/1/events"):
        for body, verb in bodies.items():
            action = github.action("POST", REPO + path, body)
            assert action is not None
            assert action.verb == verb
        assert github.action("POST", REPO + path, b'{"event": "COMMENT", "event": "APPROVE"}') is None
        assert github.action("POST", REPO + path, None) is None


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/graphql"),
        ("GET", "/user"),
        ("GET", "/search/code?q=x"),
        ("GET", "/repositories/1/contents/x"),
        ("PUT", "/repositories/1/contents/x"),
        ("DELETE", REPO),
        ("PATCH", REPO),
        ("POST", "/repos/octo/hello/../other/issues"),
        ("PUT", "/repos/octo/hello/contents/.github%2Fworkflows%2Fci.yml"),
        ("PUT", "/repos/octo/hello/contents/src/../.github/workflows/ci.yml"),
        ("PUT", "/repos/octo/hello/contents//.github/workflows/ci.yml"),
        ("PUT", "/repos/octo/hello/contents/"),
        ("GET", "/repos/octo/hello/actions/secrets"),
        ("POST", "/repos/octo/hello/hooks"),
        ("PUT", "/repos/octo/hello/collaborators/mallory"),
        ("PUT", "/repos/octo/hello/branches/main/protection"),
        ("POST", "/repos/octo/hello/statuses/abc"),
        ("POST", "/repos/octo/hello/forks"),
    ],
)
def test_unmapped_github_request_is_no_verb(method: str, target: str) -> None:
    assert RequestMap(TEMPLATES["github-api"].requests).action(method, target, b"{}") is None


def test_any_http_api_is_read_written_and_deleted_by_its_paths() -> None:
    api = RequestMap(TEMPLATES["http"].requests)
    for method, verb in {"GET": "read", "HEAD": "read", "POST": "write", "PUT": "write", "PATCH": "write",
                         "DELETE": "delete"}.items():  # fmt: skip
        for target, resource in (("/", "path"), ("/v1/orders/7?x=1", "path/v1/orders/7")):
            assert api.action(method, target) == Action(verb, resource)
    assert api.action("OPTIONS", "/") is None


def test_a_server_of_mcp_has_its_tools_as_resources() -> None:
    server = RequestMap(TEMPLATES["mcp"].requests)
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "get_issue", "arguments": {}},
    }
    assert server.action("POST", "/mcp", json.dumps(call).encode()) == Action("call", "tool/get_issue")
    told = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert server.action("POST", "/mcp", json.dumps(told).encode()) == Action("connect", "server")
    for method in ("resources/list", "prompts/get", "completion/complete", "tasks/list"):
        assert server.action("POST", "/mcp", json.dumps({**call, "method": method}).encode()) is None
    assert server.action("GET", "/mcp") == Action("connect", "server")


def test_a_rule_for_mcp_is_written_with_its_method_and_tool() -> None:
    one = _parse_request_rule(
        "MCP /mcp plan repo/{arguments.repo} message:tools/call=push argument:dry_run=true argument:to=a,b"
    )
    assert one.mcp is not None
    assert (one.mcp.method, one.mcp.name) == ("tools/call", "push")
    assert one.mcp.arguments == {"dry_run": ("true",), "to": ("a", "b")}
    bare = _parse_request_rule("MCP /mcp connect server message:notifications/*").mcp
    assert bare is not None
    assert (bare.method, bare.name, bare.arguments) == ("notifications/*", None, None)


def test_a_request_is_written_in_four_words_and_conditions() -> None:
    plain = _parse_request_rule("GET /envs/{name} read env/{name}")
    assert (plain.method, plain.path, plain.verb, plain.resource) == (
        "GET", "/envs/{name}", "read", "env/{name}",
    )  # fmt: skip
    assert (plain.query, plain.body) == (None, None)
    conditions = _parse_request_rule("POST /runs dry-run runs query:dry=1,true body:kind=test body:x=y=z")
    assert conditions.query == {"dry": ("1", "true")}
    assert conditions.body == {"kind": ("test",), "x": ("y=z",)}


@pytest.mark.parametrize(
    "text",
    ["GET /x read", "get /x read x", "GET /x Read x", "GET /x read x header:a=b", "GET /x read x body:a",
     "GET /x read x y", "POST /x read x argument:a=b", "MCP /x read x message:ping message:ping",
     "MCP /x read x message:tools/*", "MCP /x read x message:"],
)  # fmt: skip
def test_malformed_request_rule_is_rejected(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        _parse_request_rule(text)


def test_given_verb_overrides_the_template() -> None:
    verbs = {one.verb: one.floor for one in _merge_verbs(TEMPLATES["redis"], ["write=operator", "incr"])}
    assert verbs == {"read": "none", "write": "operator", "incr": "none"}
    assert [one.verb for one in _merge_verbs(None, ["deploy"])] == ["deploy"]


def test_settings_keep_their_type() -> None:
    assert _parse_settings(["connection_limit=2", "owned=keep"]) == {"connection_limit": 2, "owned": "keep"}
    assert _parse_settings(["username=007", "scheme=Token"]) == {"username": "007", "scheme": "Token"}


@pytest.mark.parametrize("text", ["owned", "=x", "kind=jwt", "audience=x", "a b=1"])
def test_malformed_setting_is_rejected(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        _parse_settings([text])


def test_neither_verb_nor_template() -> None:
    with pytest.raises(typer.BadParameter, match="template"):
        _merge_verbs(None, [])
    with pytest.raises(typer.BadParameter, match="none of"):
        _template("mainframe")


def issued(kind: str, value: str) -> IssuedCredential:
    named = dict.fromkeys(
        ("lease_id", "request_id", "target", "task_id", "agent_id", "sponsor", "on_behalf_of"), "x"
    )
    given: dict[str, Any] = {"token_type": None, "expires_at": 1, "scope": (), "delivery": "agent", **named}
    return IssuedCredential(kind=kind, secret=Secret(value), **given)


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


def test_credential_without_a_file_is_only_in_the_environment() -> None:
    with applied(issued("redis", "redis://u:p@h:1/0")) as variables:
        assert variables == {"REDIS_URL": "redis://u:p@h:1/0"}


def test_mysql_client_reads_an_option_file_that_is_gone_after() -> None:
    url = "mysql://user:p%40ss@db.example:3307/shop?sslmode=verify-full"
    with applied(issued("mysql", url)) as variables:
        assert variables.keys() == {"MYSQL_HOME", "DATABASE_URL"}
        file = Path(variables["MYSQL_HOME"]) / "my.cnf"
        assert file.stat().st_mode & 0o077 == 0
        options = ConfigParser(allow_no_value=True)
        options.read_string(file.read_text())
        client = options["client"]
        assert (client["host"], client["port"], client["user"], client["password"]) == (
            "db.example", "3307", "user", "p@ss",
        )  # fmt: skip
        assert {"loose-ssl-verify-server-cert", "loose-ssl-mode"} <= client.keys()
        assert options["mysql"]["database"] == '"shop"'
    assert not file.exists()


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
