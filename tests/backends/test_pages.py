"""The commands of docs/targets.md, and of the pages of docs/targets: a running stack, and the targets' real servers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.backends.ssh.backend import SshLogin
from tests.backends.kinds import SSH_USERS
from tests.site.dev_folder import dev_running, inherited
from tests.site.page_commands import ROOT, blocks_of, run_page
from tests.support.servers.mariadb import MariadbServer, MariadbTarget
from tests.support.servers.postgres import PostgresServer, PostgresTarget
from tests.support.servers.redis_target import valkey_target
from tests.support.servers.ssh import SshServer, SshTarget

DOCS = ROOT / "docs"
AS_OLGA = "export RINGFENCE_IDENTITY=.ringfence/users/olga.json\n"
ASKS = "ringfence --identity bot.json request --task TASK"
ASK_AT_A_TERMINAL = ("ringfence target add", "ringfence target remove", "ringfence user set")
STAFF = """\
ringfence user set sam --add '{scope}' --yes
ringfence user set maria --add '{scope}' --yes
ringfence key new bot.json --id agent/{bot}
ringfence --identity .ringfence/users/sam.json agent register {bot} --description "of a page" --key-file bot.json \\
    --allow '{scope}'
TASK=$(ringfence --json --identity .ringfence/users/maria.json task assign {bot} --purpose "try it" \\
    --allow '{scope}' --for 30m | jq -r .task_id)
"""
"""What docs/targets.md says of people and agents, for the target of another page."""


@dataclass
class Place:
    """A running stack whose issuer, revoker and gateway read their rights of each target from `rights/TARGET`."""

    folder: Path

    @property
    def rights(self) -> Path:
        return self.folder / "rights"

    def run(self, page: str, scope: str = "", replaced: dict[str, str] | None = None, path: str = "") -> str:
        """Run a page as an operator. `bot.json` is an agent with a task for `scope` once the page's target is there."""
        own = self.folder / Path(page).stem
        own.mkdir()
        (own / ".ringfence").symlink_to(self.folder / ".ringfence")
        environment = inherited() | {"RINGFENCE_CONFIG": str(self.folder / ".ringfence/ringfence.toml")}
        if path:
            environment["PATH"] = f"{path}:{environment['PATH']}"
        texts = dict(replaced or {}) | {
            one: f"{one} --yes" for one in ASK_AT_A_TERMINAL if one in (DOCS / page).read_text()
        }
        if scope:
            (own / "staff.sh").write_text(STAFF.format(bot=f"{own.name}-bot", scope=scope))
            texts[ASKS] = "source ./staff.sh && " + ASKS.replace("TASK", '"$TASK"')
        return run_page(DOCS / page, own, environment, texts, AS_OLGA)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("pages"))
    place.rights.mkdir()
    access = {
        name: f"file:{place.rights / f'{name}.rights'}"
        for name in ("shop", "stock", "cache", "files", "partner", "hub", "llm", "claude", "code")
    }
    with dev_running(place.folder, RINGFENCE_BACKENDS_ACCESS=json.dumps(access)):
        yield place


async def test_postgres(place: Place, own_postgres_server: PostgresServer) -> None:
    target = PostgresTarget("shop", own_postgres_server, place.rights, "shop")
    await target.make(
        ["CREATE SCHEMA shop", "CREATE TABLE shop.orders (id int)", "INSERT INTO shop.orders VALUES (7), (8)"]
    )
    there = {"db.example:5432": target.address}
    printed = place.run("targets/postgres.md", "shop:read:shop/**", there, str(own_postgres_server.programs))
    assert re.search(r"count *\n-+\n +2\n", printed), printed


def test_mysql(place: Place, mariadb_server: MariadbServer) -> None:
    target = MariadbTarget("stock", mariadb_server, place.rights)
    mariadb_server.admin(
        "DROP USER IF EXISTS ringfence",
        "CREATE DATABASE IF NOT EXISTS shop",
        "CREATE TABLE shop.orders (id int)",
        "INSERT INTO shop.orders VALUES (7), (8)",
    )
    target.make([])
    there = {"stock.example:3306": target.address}
    printed = place.run("targets/mysql.md", "stock:read:shop/**", there)
    assert "count(*)\n2\n" in printed, printed


async def test_redis(place: Place) -> None:
    set_up, take_away = [
        one.body.split() for one in blocks_of(DOCS / "targets/redis.md") if one.body.startswith("ACL ")
    ]
    async with valkey_target("cache", place.rights) as target, target.admin() as admin:
        await admin.execute_command(*set_up)
        target.place(f"redis://ringfence:a-long-random-password@{target.address}/0\n")
        await admin.set("jobs/17", "waits")
        printed = place.run("targets/redis.md", "cache:read:jobs/**", {"cache.example:6379": target.address})
        assert "waits" in printed
        await admin.execute_command(*take_away)
        assert "ringfence" not in await target.users()


def test_jwt(place: Place) -> None:
    place.run("targets/jwt.md")


def test_http(place: Place) -> None:
    place.run("targets/http.md", "partner:read:path/v1/orders/**")


def test_github(place: Place) -> None:
    place.run(
        "targets/github-api.md",
        '{"target": "hub", "verbs": ["contents:read"], "resources": ["repos/octo/hello/**"]}',
    )


def test_model(place: Place) -> None:
    place.run("targets/model.md", "llm:generate:model/gpt-5")


def test_git(place: Place) -> None:
    place.run("targets/git.md", "code:fetch:repo/octo/hello")


def test_ssh(place: Place, ssh_server: SshServer) -> None:
    target = SshTarget("files", ssh_server, place.rights)
    target.write_secret()
    ssh_server.write_config(SSH_USERS | {"deploy": {"read": {"status": ["/bin/echo", "shop is up"]}}})
    there = {
        "files.example:22": target.address,
        "ssh_host_ed25519_key.pub ringfence_ca": f"{ssh_server.folder / 'host.pub'} ringfence_ca",
        "> /run/secrets/files-ssh": "> files-ssh",
    }
    assert "shop is up\n" in place.run("targets/ssh.md", "files:read:deploy/status", there)
    written = SshLogin.parse((place.folder / "ssh/files-ssh").read_text())
    assert written.host_keys, "the backend reads what the page wrote"


def test_the_overview(place: Place) -> None:
    assigned = "ringfence --identity .ringfence/users/maria.json task assign"
    line = next(
        one for one in (DOCS / "targets.md").read_text().splitlines() if assigned in one
    ).removeprefix("$ ")
    place.run(
        "targets.md",
        replaced={
            line: f"TASK=$({line.replace('ringfence', 'ringfence --json', 1)} | jq -r .task_id)",
            "--task TASK": '--task "$TASK"',
        },
    )
