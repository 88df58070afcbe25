"""What a target's record may say to its backend: checked before it is set, by the SDK and by the registry."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.cli.main import main
from ringfence.client.admin import target_backends
from ringfence.client.admin.target_backends import backend_problem
from ringfence.messages.registry import BackendSettings
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.target_settings import problems
from tests.support.in_memory_registry import InMemoryRegistry


def backend(kind: str, **settings: Any) -> BackendSettings:
    return BackendSettings.model_validate({"kind": kind, **settings})


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_say_what_their_backend_understands(name: str) -> None:
    template = TEMPLATES[name]
    wrong = problems(backend(template.backend, **template.settings))
    assert wrong in ([], ["backend http needs the setting url: write https://HOST or https://HOST:PORT, without a "
                          "path; http only for 127.0.0.1, localhost or [::1]"])  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (backend("http"), "needs the setting url"),
        (backend("jwt", ulr="https://a.example"), "backend jwt has no setting ulr; did you mean url?"),
        (backend("redis", tls="yes"), "backend redis has no setting tls; it has address"),
        (backend("jwt", dpop="always"), "dpop: Input should be 'off' or 'required'"),
        (backend("jwt", url="https://a.example:70000"), "url is malformed"),
        (backend("ssh", source_address="10.0.0.1/8"), "source_address: "),
        (backend("postgres", address="db.example"), "address is malformed"),
        (backend("postgres", audience="x"), "an audience is for tokens"),
        (backend("jwt", audience=""), "the audience is empty"),
        (backend("jwt", audience="a\u202eb"), "characters that nobody sees"),
        (backend("jwt", url="https://a..example"), "url is malformed"),
        (backend("jwt", url="https://-"), "url is malformed"),
        (backend("jwt", url="https://1.2.3"), "url is malformed"),
        (backend("jwt", url="https://[:::]"), "url is malformed"),
        (backend("ssh", address="..:22"), "address is malformed"),
        (backend("redis", address="a.example:0"), "address is malformed"),
        (backend("postgres", SSLMODE="require"), "no setting SSLMODE; did you mean sslmode?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_registry_refuses_what_a_built_in_backend_does_not_understand(
    given: BackendSettings, says: str
) -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    command = ledger.target_set("olga", "shop", backend=given)
    with pytest.raises(CommandRefusedError) as refused:
        ledger.give(command)
    assert refused.value.code == "target_settings_invalid"
    assert says in str(refused.value)
    # A record of such a target, from before it was refused, still counts, and can be set right.
    ledger.give_as_before(command)
    assert ledger.directory.target("shop") is not None
    ledger.give(ledger.target_set("olga", "shop"))


@pytest.mark.parametrize(
    "place",
    [
        "db",
        "db.example.",
        "DB-1.example:5432",
        "192.0.2.7:5432",
        "[2001:db8::1]:5432",
        "[::1]",
        "7up.example",
    ],
)
def test_a_place_that_can_be_reached_is_taken(place: str) -> None:
    assert problems(backend("jwt", url=f"https://{place}")) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--backend", "POSTGRES"], "there is no backend POSTGRES; did you mean postgres?"),
        (["--backend", ""], "there is no backend without a name"),
        (["--backend", "postgres", "--setting", "connection-limit=3"], "did you mean connection_limit?"),
        (["--backend", "postgres", "--setting", "connection_limit=" + "9" * 5000], "connection_limit: "),
        (["--setting", "audience=https://a.example"], "write --audience VALUE"),
        (["--setting", "kind=jwt"], "write --backend VALUE"),
        (["--setting", "dpop=off", "--setting", "dpop=required"], "dpop is there twice"),
        (["--setting", "=off"], "write NAME=VALUE"),
        (["--audience", ""], "the audience is empty"),
    ],
)
def test_target_add_says_what_is_wrong_and_what_was_meant(
    options: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")  # no line is folded
    monkeypatch.setenv("TERMINAL_WIDTH", "10000")
    assert main(["target", "add", "shop", "--description", "x", "--verb", "read", *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [("jwt", "url"), ("jwt", "dpop"), ("ssh", "source_address")])
def test_no_value_is_quoted(kind: str, name: str) -> None:
    (problem,) = problems(backend(kind, **{name: "hunter2"}))
    assert "hunter2" not in problem


def test_a_backend_of_another_package_is_known_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = backend("paper", colour="green")
    assert "there is no backend paper. There are http, jwt, mysql, postgres, redis, ssh." in str(
        backend_problem(paper, anyway=False)
    )
    assert backend_problem(paper, anyway=True) is None
    installed = [EntryPoint("paper", "paper_backend:Paper", "ringfence.backends")]
    monkeypatch.setattr(target_backends, "entry_points", lambda group: installed)
    assert backend_problem(paper, anyway=False) is None
    # What a built-in backend does not understand, nobody's word makes understood.
    assert backend_problem(backend("jwt", ulr="x"), anyway=True) is not None
