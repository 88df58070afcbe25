"""A task on behalf of somebody who signed in, by commands alone, through the real registry."""

from __future__ import annotations

import json
import time

from ringfence.messages.registry import TaskRecord
from ringfence.messages.topics import TASK
from tests.flows.test_cli import Shell
from tests.flows.test_user_sync import shell as shell
from tests.support.oidc_tokens import TokenIssuer
from tests.support.world import World, scope

ISSUER = TokenIssuer("https://login.acme.example")
TOMORROW = time.strftime("%Y-%m-%dT18:00:00Z", time.gmtime(time.time() + 86_400))
TERMS = (
    "--purpose", "release 41", "--allow", "platform:deploy:env/staging/*", "--until", TOMORROW,
)  # fmt: skip


async def test_a_user_who_signed_in_has_a_task_assigned_on_their_behalf(shell: Shell, world: World) -> None:
    bundle = world.make_bundle(2).model_copy(update={"oidc_issuers": (ISSUER.pinned("users"),)})
    await world.publish_trust(bundle)
    trust = world.runtimes["registry"].trust
    await world.until(lambda: trust.version == 2 or None, "the new trust bundle at the registry")
    sam = await world.user("sam", ("sponsor",))
    sam.key.save(shell.folder / "sam.json")
    await world.user("maria", (), scope("platform", ["deploy"], ["**"]), keys=())
    await world.agent("my-bot", sam, scope("platform", ["deploy"], ["**"]))

    nonce = (await shell("sam", "task", "nonce", "my-bot", *TERMS)).strip()
    token = ISSUER.token(ISSUER.claims(world.td, time.time(), sub="maria", nonce=nonce))
    file = shell.folder / "token.jwt"
    file.write_text(token + "\n")
    assign = ("task", "assign", "my-bot", *TERMS, "--on-behalf-of", "maria", "--id-token", str(file))
    task = json.loads(await shell("sam", "--json", *assign))
    assert (task["on_behalf_of"], len(task["effective"])) == ("maria", 1)
    record = await world.consume_until(TASK, lambda r: r.key == task["task_id"])
    state = world.opened(record, TaskRecord, "registry").state
    assert (state.on_behalf_of, state.assigned_by) == ("maria", "sam")

    told = await shell("sam", *assign, status=1)
    assert "this consent was used for task" in told
    assert token not in told
    other = ("task", "assign", "my-bot", "--purpose", "else", *TERMS[2:], "--on-behalf-of", "maria")
    told = await shell("sam", *other, "--id-token", str(file), status=1)
    assert "nonce" in told
    assert "--until" in await shell(
        "sam", "task", "assign", "my-bot", *TERMS[:4], "--for", "1h", *assign[-4:], status=2
    )
