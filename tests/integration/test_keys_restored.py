"""Keys of services and of the root are lost, and come back as `docs/operators/backup-and-restore.md` has it.

Needs `age`, which encrypts the page's copies.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.admin.trust_setup import SERVICE_ROLES
from ringfence.kernel.crypto.keys import SigningKey
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.site.page_commands import ROOT, run_page, section_of
from tests.support.installation import STARTED, WITHIN_S, Installation, installed, lease, organise

PAGE = ROOT / "docs/operators/backup-and-restore.md"

pytestmark = [pytest.mark.tools, pytest.mark.timeout(600)]


@pytest.fixture
def here(kafka: Kafka, redis_server: RedisServer, tmp_path: Path) -> Iterator[Installation]:
    """A running installation whose keys have a copy, made as the page says."""
    with installed(kafka, redis_server, tmp_path) as made:
        page(made, "Back up the keys")
        yield made


def page(here: Installation, heading: str) -> str:
    """Run what the page has under a heading."""
    return run_page(PAGE, here.folder, here.environment("olga"), blocks=section_of(PAGE, heading))


def keys_of(here: Installation) -> Path:
    return here.trust.path / "keys"


def refusal(here: Installation, name: str) -> str:
    """What a service says that ends at once, because it cannot start."""
    child = here.launch(name)
    assert child.wait(WITHIN_S) == 1
    return child.log_tail(5)


def said(here: Installation, name: str) -> Any:
    return json.loads(here.text(name, "/readyz"))


def test_keys_come_back_from_their_copy(here: Installation) -> None:
    task = organise(here)
    held = lease(here, task, "30m")
    before = {file.name: (file.read_bytes(), file.stat().st_uid) for file in keys_of(here).iterdir()}
    assert before[f"{SERVICE_ROLES[0]}.json"][0] not in (here.folder / "service-keys.tar.age").read_bytes()
    here.stop()
    shutil.rmtree(keys_of(here))

    for name in STARTED:
        told = refusal(here, name)
        assert f"keys/{name}.json is not there; restore it from its backup" in told
        assert f"ringfence init --rotate-service {name} --publish" in told

    page(here, "Keys of services were lost, and there is a copy")
    after = {file.name: (file.read_bytes(), file.stat().st_uid) for file in keys_of(here).iterdir()}
    assert after == before
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys_of(here).iterdir()} == {0o600}

    # As a copy by other means may come back: open to others, or under another's name.
    key = keys_of(here) / "issuer.json"
    key.chmod(0o644)
    assert f"run: chmod 600 {key}" in refusal(here, "issuer")
    own = key.read_bytes()
    key.chmod(0o600)
    key.write_bytes((keys_of(here) / "policy.json").read_bytes())
    child = here.launch("issuer")
    child.wait_until(
        lambda: "put the issuer's own key there" in (here.unready("issuer") or ""), WITHIN_S, "named its wrong key"
    )  # fmt: skip
    here.stop("issuer")
    key.write_bytes(own)

    here.start()
    assert here.leases() == {held}
    here.say("release", held, who="bot")
    assert lease(here, task, "10m")


def test_the_root_comes_back_from_its_copy(here: Installation) -> None:
    root, bundle = here.trust.root_key, here.trust.bundle
    fingerprint, copied = SigningKey.load(root).kid, bundle.read_text()
    root.unlink()
    bundle.unlink()
    missing = here.run("init", "--renew", "--publish")
    assert missing.returncode == 1
    assert "root.json" in missing.stderr

    page(here, "The root was lost, and there is a copy")
    assert stat.S_IMODE(root.stat().st_mode) == 0o600
    assert SigningKey.load(root).kid == fingerprint
    task = organise(here)
    assert lease(here, task, "10m")
    assert {said(here, name)["trust_bundle"] for name in STARTED} == {2}

    # A copy of before that: whoever signs the next bundle by it is told that nobody would follow.
    newest = bundle.read_text()
    bundle.write_text(copied)
    refused = here.run("init", "--rotate-service", "policy", "--compromised", "--publish")
    assert refused.returncode == 1
    assert "everybody follows trust bundle 2 on Kafka" in refused.stderr
    assert not (keys_of(here) / "policy-next.json").exists(), "nothing was made"
    beside = bundle.with_name("trust-bundle-2.jws")
    assert beside.read_text() == newest
    beside.replace(bundle)
    here.say("init", "--rotate-service", "policy", "--compromised", "--publish")
    here.await_ready("policy")
    assert lease(here, task, "10m")


def test_lost_keys_without_a_copy_are_replaced(here: Installation) -> None:
    task = organise(here)
    held = lease(here, task, "30m")
    here.stop("issuer")
    for file in keys_of(here).glob("issuer*"):
        file.unlink()
    assert "issuer.json is not there; restore it from its backup" in refusal(here, "issuer")

    page(here, "Keys of services were lost, and there is no copy")
    here.start("issuer")
    assert said(here, "issuer")["trust_bundle"] == 2
    assert said(here, "issuer")["signs_by"] == SigningKey.load(keys_of(here) / "issuer.json").kid
    assert not said(here, "issuer").get("warnings"), "it has the key that credentials are sealed to"
    assert here.leases() == {held}, "what the lost key signed still counts"
    here.say("release", held, who="bot")
    assert lease(here, task, "10m")
    # The next rotation goes on from there.
    here.say("init", "--rotate-service", "issuer", "--publish")
    (following,) = keys_of(here).glob("issuer-next.json")
    assert SigningKey.load(following).kid != said(here, "issuer")["signs_by"]
