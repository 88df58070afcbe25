"""Attacks by a run on the rest of Ringfence: its key outside, other tasks, forged records, floods."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.client.connection import Connection
from ringfence.client.errors import EnrolmentRefusedError
from ringfence.client.instance_enrolment import enrolment_request, post_enrolment
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Permission
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.enrolment import InstanceEnrolment
from ringfence.messages.run import Run
from ringfence.messages.topics import CREDENTIAL_REQUEST, RUN
from tests.runner.installation import SCOPE, WITHIN_S, Installation, until
from tests.support.benches.agent_api_bench import JOSE, Caller, Posted

READ = (Permission(target="notes", verbs=("read",), resources=("note/*",)),)
FLOOD = 300
BURST, A_SECOND = 100, 20
"""Posts of one agent (docs/http-access.md)."""


@dataclass
class Stolen:
    """Key and enrolment of a run, copied out by its command through a writable mount."""

    here: Installation
    run_id: str
    task: str
    folder: Path
    key: SigningKey
    enrolment: str
    kill: Callable[[], None]
    """Ends the run, and waits until its end is published."""

    @property
    def socket(self) -> Path:
        return self.here.folder / f".ringfence/tasks/{self.run_id}.sock"

    def over_socket(self) -> Caller:
        return Caller("http://ringfence", socket=self.socket)

    def over_listener(self, key: SigningKey | None = None) -> Caller:
        return Caller(f"{self.here.listener}/ringfence", key or self.key)

    def request(self, *, key: SigningKey | None = None, **fields: Any) -> Posted:
        """A request that the run's instance may make, but for `fields`."""
        now, reply_key = int(time.time()), ReplyKey()
        given = {
            "iss": self.key.id, "aud": self.here.settings().trust_domain, "iat": now, "exp": now + 120,
            "jti": str(uuid.uuid4()), "task_id": self.task, "scope": READ, "ttl_s": 300, "reason": "to look",
            "reply_key": reply_key.public, "enrolment": self.enrolment, "delivery": "gateway",
        }  # fmt: skip
        claims = CredentialRequest(**{**given, **fields})
        return Posted(claims, sign(claims, key or self.key), reply_key)

    def ask(self, task: str | None = None, *, enrolment: str | None = None) -> dict[str, Any]:
        """Ask by the SDK outside, at the gateway's listener. Returns what it prints: the lease, or a code."""
        if enrolment is not None:
            (self.folder / "enrolment.jws").write_text(enrolment)
        environment = {
            "RINGFENCE_DOOR": self.here.listener, "RINGFENCE_RUN_INSTANCE": str(self.folder),
            "RINGFENCE_AGENT": "reader-bot", "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_TRUST_ROOT": self.here.settings().trust_root,
            "RINGFENCE_TRUST_DOMAIN": self.here.settings().trust_domain,
        }  # fmt: skip
        done = self.here.call(
            "--json", "request", "--task", task or self.task, "--allow", SCOPE, "--reason", "look", "--delivery",
            "gateway", environment=environment,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout or done.stderr)
        return found


@contextlib.contextmanager
def stolen(here: Installation, task: str | None = None) -> Iterator[Stolen]:
    """A run that goes on until the block ends, or until `kill` is called."""
    task = task or here.task
    known = set((here.folder / ".ringfence/tasks").glob("*.sock"))
    with tempfile.TemporaryDirectory(prefix="taken-", dir=here.folder) as folder:
        process = here.start(
            "run", "--task", task, "--mount", f"{folder}:rw-as-root", "--", "sh", "-c",
            f"cp -r /run/ringfence/instance {folder}/taken && echo ready; exec cat", stdin=-1,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n", process.stderr and process.stderr.read()
            taken = Path(folder) / "taken"
            (socket,) = (
                path
                for path in set((here.folder / ".ringfence/tasks").glob("*.sock")) - known
                if path.stem != task
            )

            def end() -> None:
                process.communicate(timeout=WITHIN_S)

            yield Stolen(
                here, socket.stem, task, taken, SigningKey.load(taken / "key.json"),
                (taken / "enrolment.jws").read_text().strip(), end,
            )  # fmt: skip
        finally:
            if process.returncode is None:
                process.communicate(timeout=WITHIN_S)


def live_leases(here: Installation) -> set[str]:
    return {one["id"] for one in here.say("lease", "list", who="olga")["leases"]}


def code(answer: httpx.Response) -> str:
    return str(answer.json()["code"])


@contextlib.asynccontextmanager
async def connected(here: Installation, key: Path) -> AsyncIterator[Connection]:
    async with Connection(key, here.settings()) as connection:
        yield connection


# --- the key of a run, taken outside ----------------------------------------------------------------------------------


async def test_the_key_of_a_run_is_worth_nothing_after_its_end(here: Installation) -> None:
    """During the run it is the run, wherever it is: it asks within the task, and all that it got ends with the run."""
    with stolen(here) as run:
        lease = run.ask()["lease_id"]
        assert lease in live_leases(here)
        assert (await run.over_listener().post(run.request())).status_code == 202
        assert (await run.over_socket().post(run.request())).status_code == 202
        run.kill()
        until(lambda: not run.socket.exists(), "the end of its socket")
        # The gateway's API decides nothing: policy denies what it publishes.
        assert run.ask()["code"] == "run_ended"
        assert lease not in live_leases(here)
        with_handle = httpx.get(
            f"{here.listener}/notes/notes/today", headers={"X-Ringfence-Handle": lease}, trust_env=False
        )
        assert with_handle.status_code in (401, 403), with_handle.text


async def test_the_key_of_a_run_is_for_no_other_task(here: Installation) -> None:
    other = here.assign()
    with stolen(here) as run:
        answer = await run.over_socket().post(run.request(task_id=other))
        assert (answer.status_code, code(answer)) == (403, "socket_other_task")
        assert run.ask(other)["code"] == "instance_other_task"
        assert "lease_id" in run.ask()


async def test_one_run_is_not_another_one_of_the_same_task(here: Installation) -> None:
    with stolen(here) as one, stolen(here) as other:
        answer = await one.over_socket().post(other.request())
        assert (answer.status_code, code(answer)) == (403, "socket_other_run")
        # Its key with the other's enrolment is nobody's.
        answer = await one.over_listener().post(one.request(enrolment=other.enrolment))
        assert answer.status_code in (400, 403), answer.text
        # A proof by another key than the one that signed.
        answer = await one.over_listener(other.key).post(one.request())
        assert answer.status_code == 401, answer.text
        posted = one.request()
        assert (await one.over_listener().post(posted)).status_code == 202
        assert (await one.over_listener().get(posted, "?wait=30s")).status_code == 200
        assert (await one.over_listener(other.key).get(posted, "?wait=1s")).status_code == 404


async def test_an_enrolment_token_is_for_one_key_and_run_and_only_while_it_goes_on(
    here: Installation,
) -> None:
    settings = here.settings()

    async def refused(key: SigningKey, token: str) -> str:
        with pytest.raises(EnrolmentRefusedError) as error:
            await post_enrolment(
                settings, enrolment_request(key, token, settings.trust_domain, int(time.time()))
            )
        return str(error.value.code)

    with stolen(here) as run, stolen(here) as other:
        token = parse(run.enrolment).unverified_claims(InstanceEnrolment).token
        assert token is not None
        assert await refused(SigningKey.generate(run.key.id), token) == "aud_unexpected"
        assert await refused(other.key, token) == "aud_unexpected"
        stranger = SigningKey.generate(run.key.id.replace("reader-bot", "review-bot"))
        assert await refused(stranger, token) in ("aud_unexpected", "instance_unmatched")
        run.kill()
        # The same key again, after the end: whatever the registry says, it is worth nothing.
        try:
            again = await post_enrolment(
                settings, enrolment_request(run.key, token, settings.trust_domain, int(time.time()))
            )
        except EnrolmentRefusedError:
            again = run.enrolment
        assert run.ask(enrolment=again)["code"] == "run_ended"


# --- forged records ---------------------------------------------------------------------------------------------------


async def test_forged_run_records_neither_end_nor_revive_a_run(here: Installation) -> None:
    keys = here.folder / ".ringfence/keys"

    async def seen(connection: Connection, run_id: str) -> list[Run]:
        found: list[Run] = []

        def look(records: Any) -> None:
            found.extend(
                parse(record.value).unverified_claims(Run) for record in records if record.key == run_id
            )

        await connection.follow([RUN], look)
        return found

    with stolen(here) as run:
        async with connected(here, keys / "runner-1.json") as runner:
            record = (await seen(runner, run.run_id))[-1]
        assert record.status == "started"
        forged = {"status": "ended", "exit": {"code": 0}}

        def another(**fields: Any) -> Run:
            changed = {
                **record.model_dump(),
                **forged,
                "jti": str(uuid.uuid4()),
                "iat": int(time.time()),
                **fields,
            }
            return Run.model_validate({name: value for name, value in changed.items() if value is not None})

        for name in ("gateway", "registry", "audit"):
            async with connected(here, keys / f"{name}.json") as other:
                await other.publish(RUN, run.run_id, another(iss=other.key.id))
                await other.publish(RUN, run.run_id, another())
        async with connected(here, run.folder / "key.json") as other:
            await other.publish(RUN, run.run_id, another(iss=other.key.id))
            await other.publish(RUN, run.run_id, another())
        assert "lease_id" in run.ask()
        assert run.socket.exists()
        run.kill()
        # Nor does anybody take the end back, its runner included.
        async with connected(here, keys / "runner-1.json") as runner:
            await runner.publish(
                RUN, run.run_id, another(status="started", exit=None, at_ms=record.at_ms + 1)
            )
        async with connected(here, keys / "gateway.json") as other:
            await other.publish(RUN, run.run_id, another(status="started", exit=None, iss=other.key.id))
        assert run.ask()["code"] == "run_ended"
        until(lambda: not run.socket.exists(), "the end of its socket")
        until(lambda: alarms(here).total() == 10, "an alarm for each of them")


def alarms(here: Installation) -> Counter[str]:
    """How often the trail tells of a record that its signer may not write."""
    done = here.call(
        "--json", "audit", "tail", "-n", "1000", "--no-follow", "--code", "run.refused", "--code",
        "record.not_believed", who="ali",
    )  # fmt: skip
    return Counter(json.loads(line)["metadata"]["event_code"] for line in done.stdout.splitlines())


# --- posts ------------------------------------------------------------------------------------------------------------


async def requests_of(connection: Connection, run: Stolen) -> list[bytes]:
    """The requests on Kafka that the run's key signed."""
    found: list[bytes] = []

    def look(records: Any) -> None:
        for record in records:
            assert isinstance(record, Received)
            if record.value and parse(record.value).header.kid == run.key.kid:
                found.append(bytes(record.value))

    await connection.follow([CREDENTIAL_REQUEST], look, since_ms=0)
    return found


async def test_a_request_posted_many_times_at_once_is_published_once(here: Installation) -> None:
    with stolen(here) as run:
        posted, once_more = run.request(), run.request()
        answers = await asyncio.gather(
            *(run.over_socket().post(posted) for _ in range(8)), *(run.over_listener().post(posted) for _ in range(8))
        )  # fmt: skip
        assert {answer.status_code for answer in answers} == {202}
        assert (await run.over_socket().post(once_more)).status_code == 202
        async with connected(here, here.folder / ".ringfence/keys/audit.json") as reader:
            seen = Counter(await requests_of(reader, run))
    assert seen == {posted.compact.encode(): 1, once_more.compact.encode(): 1}


async def test_request_of_one_agent_is_answered_during_a_flood_by_another(here: Installation) -> None:
    """However fast the posts are, no more of the flood are accepted than the share of one agent."""
    here.say(
        "agent", "register", "calm-bot", "--description", "asks once", "--allow", SCOPE, "--selector",
        "runner=runner-1 life=1h",
    )  # fmt: skip
    with stolen(here) as loud, stolen(here, here.assign("calm-bot")) as calm:

        async def ask_once() -> httpx.Response:
            posted = calm.request()
            assert (await calm.over_socket().post(posted)).status_code == 202
            return await calm.over_socket().get(posted, "?wait=60s")

        flood = [loud.request() for _ in range(FLOOD)]
        (answers, took_s), answer = await asyncio.gather(post_all(loud, flood), ask_once())
    assert answer.status_code == 200
    assert set(answers) <= {202, 429}, answers
    assert answers[202] <= BURST + A_SECOND * (took_s + 1), (answers, took_s)


async def post_all(run: Stolen, messages: list[Posted]) -> tuple[Counter[int], float]:
    """Post them on 16 connections. Returns how often which status came, and how long it took, in seconds."""
    transport = httpx.AsyncHTTPTransport(uds=str(run.socket), limits=httpx.Limits(max_connections=16))
    began = time.monotonic()
    async with httpx.AsyncClient(transport=transport, timeout=WITHIN_S) as http:
        found = await asyncio.gather(
            *(
                http.post("http://ringfence/v1/requests", content=one.compact, headers=JOSE)
                for one in messages
            )
        )
    return Counter(one.status_code for one in found), time.monotonic() - began
