"""Commands that replace something, against all services: they say what goes, ask, and refuse what is misspelt."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from typing import Any

import pytest

from ringfence.cli.main import main
from ringfence.client.admin.administrator import Administrator
from tests.flows.test_cli import Shell, organisation, shell

__all__ = ["shell"]
NOWHERE = "http://127.0.0.1:1"
WITHIN_S = 30.0


class Terminal(io.StringIO):
    """A person at a terminal, who answers the one question."""

    def isatty(self) -> bool:
        return True


async def lease_of(shell: Shell, task: str, what: str = "platform:read:env/staging/web") -> str:
    asked = await shell.json("bot", "request", "--task", task, "--allow", what, "--reason", "look")
    return str(asked["lease_id"])


async def state(shell: Shell, kind: str, id: str) -> Any:
    return (await shell.json("olga", kind, "show", id))["state"]


# --- replacing --------------------------------------------------------------------------------------------------------


async def test_a_ceiling_is_shown_before_and_after_and_which_leases_end(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await organisation(shell)
    lease, stays = await lease_of(shell, task), await lease_of(shell, task, "platform:read:env/test/web")
    narrower = ("agent", "set-ceiling", "bot", "--allow", "platform:read:env/test/**")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "add --yes to do it" in await shell("sam", *narrower, status=2)
    for part in (
        "allowed before: platform:read,deploy:env/**", "allowed after: platform:read:env/test/**",
        "taken away: platform:read,deploy:env/**", f"leases that end: 1: {lease}",
    ):  # fmt: skip
        assert part in shell.noted
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert "nothing was done" in await shell("sam", *narrower, status=1)
    assert (await state(shell, "agent", "bot"))["ceiling"][0]["verbs"] == ["read", "deploy"]
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    await shell("sam", *narrower)
    assert (await state(shell, "agent", "bot"))["ceiling"] == [
        {"target": "platform", "verbs": ["read"], "resources": ["env/test/**"]}
    ]
    assert (await shell.json("sam", "lease", "show", stays))["status"] == "active"
    # The lease that no longer fits ends after the command was accepted.
    async with asyncio.timeout(WITHIN_S):
        while (await shell.json("sam", "lease", "show", lease))["status"] == "active":
            await asyncio.sleep(0.05)
    found = await shell.json("sam", "agent", "set-ceiling", "bot", "--allow-nothing", "--yes")
    assert found["leases_ending"] == {"count": 1, "ids": [stays], "more": False, "gap": None}
    assert (found["before"][0]["resources"], found["after"]) == (["env/test/**"], [])
    assert shell.noted == ""


async def test_leases_that_end_are_unknown_without_the_revoker(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await organisation(shell)
    monkeypatch.setenv("RINGFENCE_REVOKER_URL", NOWHERE)
    await shell("sam", "agent", "set-ceiling", "bot", "--allow", "platform:read:env/**", "--yes")
    assert "leases that end: not known: the revoker at" in shell.noted
    found = await shell.json("sam", "agent", "set-ceiling", "bot", "--allow-nothing", "--yes")
    assert found["leases_ending"]["count"] is None
    assert "does not answer" in found["leases_ending"]["gap"]


class Meddler(Terminal):
    """A person who says yes after somebody else's command was carried out."""

    def __init__(self, *command: str) -> None:
        super().__init__("y\n")
        self._command = command

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        other = threading.Thread(target=main, args=(self._command,))
        other.start()
        other.join()
        return super().readline(-1 if size is None else size)


async def test_change_during_confirmation_is_not_overwritten(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await organisation(shell)
    wider = ("agent", "set-ceiling", "bot", "--add", "platform:read:lab/**")
    monkeypatch.setattr("sys.stdin", Meddler("--identity", str(shell.folder / "olga.json"), *wider))
    said = await shell("sam", "agent", "set-ceiling", "bot", "--allow", "platform:read:env/**", status=1)
    assert "somebody changed agent bot meanwhile, and nothing was done" in said
    assert [one["resources"] for one in (await state(shell, "agent", "bot"))["ceiling"]] == [
        ["env/**"],
        ["lab/**"],
    ]


async def test_a_ceiling_and_entitlements_change_in_parts(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    await organisation(shell)
    ceiling = ("agent", "set-ceiling", "bot")
    await shell("sam", *ceiling, "--remove", "platform:deploy:env/**", "--yes")
    assert (await state(shell, "agent", "bot"))["ceiling"] == [
        {"target": "platform", "verbs": ["read"], "resources": ["env/**"]}
    ]
    assert "is not held, so it cannot be removed; held is: platform:read:env/**" in await shell(
        "sam", *ceiling, "--remove", "platform:deploy:env/**", status=1
    )
    assert "globs know no exception" in await shell(
        "sam", *ceiling, "--remove", "platform:read:env/prod/*", status=1
    )
    # What only adds takes nothing away, and nobody has to be asked.
    await shell("sam", *ceiling, "--add", "platform:deploy:env/staging/*")
    assert [one["verbs"] for one in (await state(shell, "agent", "bot"))["ceiling"]] == [["read"], ["deploy"]]
    assert "say the whole" in await shell(
        "sam", *ceiling, "--allow-nothing", "--add", "platform:read:env/**", status=2
    )

    entitled = ("user", "set", "maria")
    assert "add --yes" in await shell(
        "olga", *entitled, "--remove", "platform:deploy:env/staging/*", status=2
    )
    await shell("olga", *entitled, "--remove", "platform:deploy:env/staging/*", "--yes")
    await shell("olga", *entitled, "--add", "platform:deploy:env/test/*")
    scope = (await state(shell, "user", "maria"))["entitlements"]["scope"]
    assert [(one["verbs"], one["resources"]) for one in scope] == [
        (["read"], ["env/**"]), (["deploy"], ["env/test/*"]),
    ]  # fmt: skip


async def test_removing_entitlements_does_not_renew_their_age(
    shell: Shell,
) -> None:
    """Else that would give back all the rest, once it has grown too old to count."""
    await organisation(shell)
    before = await state(shell, "user", "maria")
    looked_at = before["entitlements"]["as_of"] - 10_000_000
    async with Administrator.connect(shell.folder / "olga.json") as administrator:
        entry = (await administrator.directory()).user("maria")
        assert entry is not None
        await administrator.set_user(
            "maria", name="Maria", keys=entry.state.keys, entitlements=entry.state.entitlements.scope, as_of=looked_at
        )  # fmt: skip

    async def as_of() -> int:
        return int((await state(shell, "user", "maria"))["entitlements"]["as_of"])

    entitled = ("user", "set", "maria", "--yes")
    await shell("olga", *entitled, "--remove", "platform:read:env/**")
    assert await as_of() == looked_at
    await shell("olga", *entitled, "--add", "platform:read:env/test/*")
    assert await as_of() > looked_at


async def test_a_consent_is_for_a_day_at_most(shell: Shell) -> None:
    """Longer, nobody would take it: then it must not say that it counts so long."""
    terms = ("--purpose", "look", "--for", "1h", "--allow", "platform:read:env/**")
    for consent in (("agent", "consent-transfer", "bot"), ("task", "consent", "bot", *terms)):
        said = await shell("sam", *consent, "--valid", "25h", status=2)
        assert "longer than a consent may be used" in " ".join(said.replace("│", " ").split())


async def test_user_set_lists_losses_before_it_asks(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    task = await organisation(shell)
    lease = await lease_of(shell, task)
    said = await shell("olga", "user", "set", "maria", "--allow-nothing", status=2)
    assert f"leases that end: 1: {lease}" in said
    assert "taken away:\n    platform:read:env/**" in said
    said = await shell("olga", "user", "set", "sam", "--no-roles", status=2)
    assert "roles: sponsor  ->  none" in said
    assert "theirs become orphans" in said
    assert f"leases that end: 1: {lease}" in said
    said = await shell("olga", "user", "set", "sam", "--new-key", str(shell.folder / "sam2.json"), status=2)
    assert "the keys before end now" in said
    assert not (shell.folder / "sam2.json").exists()
    assert (await state(shell, "user", "sam"))["roles"] == ["sponsor"]


async def test_disabling_asks_and_so_does_what_makes_active_again(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    task = await organisation(shell)
    lease = await lease_of(shell, task)
    said = await shell("olga", "user", "disable", "sam", "--reason", "left", status=2)
    assert "agents that become orphans: bot" in said
    assert f"leases that end: 1: {lease}" in said
    assert (await state(shell, "user", "sam"))["status"] == "active"
    assert "there is no user nobody" in await shell(
        "olga", "user", "disable", "nobody", "--reason", "x", status=1
    )
    await shell("olga", "user", "disable", "maria", "--reason", "left", "--yes")
    again = ("user", "set", "maria", "--name", "Maria Luz")
    said = await shell("olga", *again, status=2)
    assert "maria is disabled: this makes them active again" in said
    assert "entitled to: \n" in said or "entitled to:\n" in said
    assert (await state(shell, "user", "maria"))["status"] == "disabled"
    await shell("olga", *again, "--yes")
    assert (await state(shell, "user", "maria"))["status"] == "active"


async def test_selectors_are_shown_before_they_are_replaced(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    await organisation(shell)
    first = "https://token.example.com sub=repo:acme/shop:ref:refs/heads/main"
    await shell("sam", "agent", "set-attestation", "bot", "--selector", first)
    said = await shell("sam", "agent", "set-attestation", "bot", "--none", status=2)
    assert "https://token.example.com" in said
    assert "leases that end: none" in said
    assert len((await state(shell, "agent", "bot"))["attestation"]) == 1


# --- names that are not there -----------------------------------------------------------------------------------------


async def test_unknown_name_is_refused_with_the_nearest_name(shell: Shell) -> None:
    task = await organisation(shell)
    bot2 = ("agent", "register", "bot2", "--description", "x", "--new-key", str(shell.folder / "bot2.json"))
    misspelt = ("--allow", "platfrom:read:env/**")
    refused = await shell("sam", *bot2, *misspelt, status=1)
    assert "there is no target platfrom; did you mean platform?" in refused
    assert "add --anyway" in refused
    assert not (shell.folder / "bot2.json").exists()
    await shell("sam", *bot2, *misspelt, "--anyway")
    assert shell.noted.count("warning") == 1, "it may be still to come"
    raed = ("--allow", "platform:raed,read:env/**")
    ceiling = ("agent", "set-ceiling", "bot2", "--yes")
    says = "platform has no verb raed; it has deploy, read; did you mean read?"
    assert says in await shell("sam", *ceiling, *raed, status=1)
    await shell("sam", *ceiling, *raed, "--anyway")
    # What is held already is not asked about again.
    await shell("sam", *ceiling, *raed, "--allow", "platform:deploy:env/**")
    assert "warning" not in shell.noted
    assert says in await shell("olga", "user", "set", "maria", "--yes", *raed, status=1)
    assert says in await shell("olga", "user", "set", "maria", "--add", "platform:raed:env/**", status=1)
    assert says in await shell("olga", "user", "add", "eve", "--name", "Eve", *raed, status=1)
    assign = ("--purpose", "look", "--for", "1h", *raed)
    # A task says what it allows now before it is assigned, and the warning stands there.
    await shell("maria", "task", "consent", "bot2", *assign)
    assert f"warning: {says}" in shell.noted
    ahead = (
        "approvals",
        "grant",
        task,
        "--count",
        "1",
        "--for",
        "1h",
        "--yes",
        "--allow",
        "platform:raed:env/**",
    )
    assert "platform has no verb raed" in await shell("sam", *ahead, status=1)
    shown = await shell.json("maria", "task", "assign", "bot2", *assign)
    assert shown["warnings"] == [says]
    assert shell.noted == ""
    for wild in ("platform:*:env/**", "plat*:read:env/**"):
        said = await shell("olga", "user", "set", "maria", "--add", wild, status=2)
        assert "no wildcard" in " ".join(said.replace("│", " ").split())


async def test_a_mistyped_subject_of_a_command_is_told_what_is_close(shell: Shell) -> None:
    await organisation(shell)
    said = await shell("olga", "agent", "suspend", "bto", "--reason", "lunch", status=1)
    assert "there is no agent bto; did you mean bot?" in " ".join(said.split())
    said = await shell("olga", "user", "disable", "mraia", "--reason", "left", status=1)
    assert "there is no user mraia; did you mean maria?" in " ".join(said.split())
    assert "did you mean" not in await shell(
        "olga", "agent", "suspend", "zzzzzz", "--reason", "lunch", status=1
    )


# --- transfers --------------------------------------------------------------------------------------------------------


async def sue(shell: Shell) -> None:
    key = ("--new-key", str(shell.folder / "sue.json"))
    await shell("olga", "user", "add", "sue", "--name", "Sue", "--role", "sponsor", *key)


async def test_a_sponsor_transfers_with_the_consent_of_the_new_one(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await organisation(shell)
    await sue(shell)
    refused = await shell("sam", "agent", "transfer", "bot", "--to", "sue", status=1)
    assert "no consent of sue" in refused
    assert "ringfence agent consent-transfer bot" in refused
    assert "there is no agent nobody" in await shell("sue", "agent", "consent-transfer", "nobody", status=1)
    assert "sponsor of bot already" in await shell("sam", "agent", "consent-transfer", "bot", status=1)

    stale = await shell("sue", "agent", "consent-transfer", "bot")
    assert "platform:read,deploy:env/**" in shell.noted, "what she takes on"
    await shell("sam", "agent", "set-ceiling", "bot", "--allow", "platform:read:env/**", "--yes")
    file = shell.folder / "consent"
    file.write_text(stale)
    transfer = ("agent", "transfer", "bot", "--consent", str(file))
    assert "which has changed since" in await shell("sam", *transfer, status=1)
    file.write_text((await shell.json("maria", "agent", "consent-transfer", "bot"))["consent"])
    assert "no active user with the role sponsor" in await shell("sam", *transfer, status=1)

    fresh = await shell("sue", "agent", "consent-transfer", "bot")
    file.write_text(fresh)
    assert "the consent is sue's, not maria's" in await shell("sam", *transfer, "--to", "maria", status=1)
    monkeypatch.setattr("sys.stdin", io.StringIO(fresh))
    found = await shell.json("sam", "agent", "transfer", "bot", "--consent", "-")
    assert (found["sponsor"], found["without_consent"]) == ("sue", False)
    assert (await state(shell, "agent", "bot"))["sponsor"] == "sue"
    assert "holds no consent to a transfer" in await shell(
        "sue", "agent", "transfer", "bot", "--consent", str(shell.folder / "sue.json"), status=1
    )


async def test_an_operator_transfers_without_consent_and_everybody_can_see_it(shell: Shell) -> None:
    await organisation(shell)
    await sue(shell)
    await shell("olga", "user", "disable", "sam", "--reason", "left", "--yes")
    assert (await shell.json("olga", "agent", "transfer", "bot", "--to", "sue"))["without_consent"] is True
    assert "sue did not consent" in shell.noted
    assert (await state(shell, "agent", "bot"))["without_consent"] is True
    assert "sue (did not consent)" in await shell("sue", "agent", "show", "bot")
    events = ""
    while "agent bot was transferred by" not in events:
        events = await shell("olga", "--json", "audit", "tail", "--no-follow", "-n", "200", "--agent", "bot")
    assert "sponsor sue, without their consent" in events
    assert '"without_consent":true' in events
    await shell("sue", "agent", "transfer", "bot", "--to", "sue")
    assert (await state(shell, "agent", "bot"))["without_consent"] is None


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--backend", "postgers"), "there is no backend postgers; did you mean postgres?"),
        (("--backend", "paper"), "add --anyway"),
        (("--backend", "postgres"), "say where agents reach it, as HOST:PORT"),
        (("--backend", "postgres", "--address", "db.example"), "address is malformed: write HOST:PORT"),
        (("--backend", "postgres", "--address", "db.example:99999"), "address is malformed: write HOST:PORT"),
        (("--backend", "postgres", "--address", "db:1", "--setting", "conection_limit=2"), "mean connection_limit?"),
        (("--backend", "postgres", "--address", "db:1", "--setting", "connection_limit=1000"), "connection_limit: "),
        (("--backend", "postgres", "--address", "db:1", "--setting", "sslmode=maybe"), "'verify-full'"),
        (("--backend", "postgres", "--address", "db:1", "--audience", "x"), "an audience is for tokens"),
        (("--backend", "http"), "backend http needs the setting url: write https://HOST"),
        (("--setting", "url=http://shop.example"), "url is malformed: write https://HOST"),
        (("--setting", "url=https://shop.example/api"), "url is malformed: write https://HOST"),
        (("--setting", "url=https://shop.example:0"), "url is malformed: write https://HOST"),
        (("--setting", "ulr=https://shop.example"), "backend jwt has no setting ulr; did you mean url?"),
        (("--backend", "http", "--setting", "url=https://s.example", "--setting", "auth=header"), "header goes with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
async def test_a_target_is_refused_where_its_backend_would_not_understand_it(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert main(["target", "add", "shop", "--description", "x", "--verb", "read", *words]) == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert says in told


async def test_a_target_that_is_there_is_shown_before_it_is_replaced(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    adding = ("target", "add", "shop", "--description", "the shop", "--template", "postgres")
    await shell("olga", *adding, "--address", "db.example:5432", "--setting", "sslmode=verify-full")
    shown = await shell("olga", "target", "show", "shop")
    assert "address=db.example:5432" in shown
    assert "sslmode=verify-full" in shown
    await shell("olga", *adding, "--address", "db.example:5432", "--setting", "sslmode=verify-full")
    said = await shell("olga", *adding, "--address", "db2.example:5432", status=2)
    assert "address=db.example:5432, sslmode=verify-full  ->  address=db2.example:5432" in said
    await shell("olga", *adding, "--anyway", "--yes")
    assert "no --address" in shell.noted
    await shell("olga", "target", "remove", "shop", "--reason", "x", "--yes")
    assert "shop was removed: this makes it active again" in await shell(
        "olga", *adding, "--anyway", status=2
    )
    paper = ("target", "add", "paper", "--description", "x", "--verb", "read", "--backend", "paper")
    await shell("olga", *paper, "--anyway", "--setting", "url=https://me:hunter22@paper.example")
    assert "hunter22" not in await shell("olga", "target", "show", "paper")
    assert "url=https://[redacted]@paper.example" in shell.printed


# --- revoking ---------------------------------------------------------------------------------------------------------


async def test_map_of_an_openapi_document_is_shown_before_it_is_used(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shell.folder / "api.json"
    paths = {
        "/orders/{id}": {"get": {"tags": ["orders"]}, "delete": {"tags": ["orders"]}},
        "/graphql": {"post": {}},
    }
    servers = [{"url": "https://elsewhere.example"}]
    file.write_text(json.dumps({"openapi": "3.1.0", "servers": servers, "paths": paths}))
    adding = ("target", "add", "shop", "--description", "x", "--openapi", str(file))
    where = ("--setting", "url=https://shop.example")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "add --yes to do it" in await shell("olga", *adding, *where, status=2)
    for part in (
        "2 operations have a rule", "orders:delete (operator): 1", "orders:read (none): 1",
        "POST /graphql: its body says what is done",
        "the document names https://elsewhere.example; the gateway sends requests where --setting url= says",
    ):  # fmt: skip
        assert part in shell.noted
    assert "url" in await shell("olga", *adding, "--yes", status=2), (
        "the document names no place for a secret"
    )
    assert "not both" in await shell("olga", *adding, *where, "--template", "http", status=2)
    await shell("olga", *adding, *where, "--yes", "--verb", "orders:read=sponsor")
    shop = await state(shell, "target", "shop")
    assert {one["verb"]: one["floor"] for one in shop["verbs"]} == {
        "orders:delete": "operator", "orders:read": "sponsor",
    }  # fmt: skip
    assert (shop["backend"]["kind"], shop["backend"]["url"]) == ("http", "https://shop.example")
    assert shop["delivery"] == "gateway"


async def test_revoke_says_that_the_agent_may_ask_again_and_how_to_stop_it(shell: Shell) -> None:
    task = await organisation(shell)
    await lease_of(shell, task)
    said = await shell("sam", "revoke", "--agent", "bot", "--reason", "odd")
    assert "1 lease ended; agent bot may ask again. To stop that: ringfence agent suspend bot" in said
    await lease_of(shell, task)  # so it does
    found = await shell.json("sam", "revoke", "--agent", "bot", "--reason", "odd")
    assert (found["may_ask_again"], found["stop_with"]) == (
        True,
        "ringfence agent suspend bot --reason REASON",
    )
    for words, stop in (
        (("--task", task), f"ringfence task end {task}"),
        (("--sponsor", "sam"), "ringfence inventory --sponsor sam"),
        (("--target", "platform"), "ringfence target remove platform"),
        (("--user", "maria"), "ringfence user disable maria"),
        (("--all", "--yes"), "ringfence agent suspend AGENT"),
    ):
        assert stop in await shell("olga", "revoke", *words, "--reason", "odd")
