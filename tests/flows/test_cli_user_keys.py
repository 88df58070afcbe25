"""Keys of people by commands: invite, prove, co-sign, add, list, end."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta

import pytest

from tests.flows.test_cli import Shell, shell  # noqa: F401 - a fixture


async def people(shell: Shell) -> None:  # noqa: F811
    folder = shell.folder
    for name, role in (("sam", "sponsor"), ("otto", "operator")):
        await shell(
            "olga", "user", "add", name, "--name", name.title(), "--role", role,
            "--new-key", str(folder / f"{name}.json"),
        )  # fmt: skip


async def package(shell: Shell, by: str, user: str, name: str) -> str:  # noqa: F811
    """A new key file of a user, and its package, made where the key file is."""
    folder = shell.folder
    invited = (await shell.json(by, "user", "invite", user))["invitation"]
    (folder / "invitation").write_text(invited)
    await shell(user, "key", "new", str(folder / f"{name}.json"), "--id", f"user/{user}")
    text = await shell(
        user, "key", "prove", str(folder / f"{name}.json"), "--invitation", str(folder / "invitation")
    )
    (folder / f"{name}.package").write_text(text)
    return str(folder / f"{name}.package")


async def test_a_key_is_proved_co_signed_added_listed_and_ended(shell: Shell) -> None:  # noqa: F811
    await people(shell)
    folder = shell.folder
    file = await package(shell, "olga", "sam", "sam2")
    cosigned = str(folder / "sam2.endorsement")
    await shell("otto", "user", "endorse-key", "sam", "--package", file, "-o", cosigned, "--yes")
    added = await shell.json(
        "olga", "user", "add-key", "sam", "--package", file, "--endorsement", cosigned, "--yes"
    )
    assert added["counts_from_ms"] <= added["at_ms"]

    waiting = await shell("olga", "user", "add-key", "sam", "--new-key", str(folder / "sam3.json"))
    assert "it counts for approvals from" in waiting
    assert (folder / "sam3.json").exists()

    listed = await shell.json("sam", "user", "keys")
    assert listed["user"] == "sam"
    first, second, third = reversed(listed["keys"])
    assert (first["vouchers"], second["vouchers"], third["vouchers"]) == ([], ["olga", "otto"], ["olga"])
    assert second["endorsed_by"] == "otto"
    table = await shell("olga", "user", "keys", "sam")
    assert "olga, otto" in table

    # By the beginning of its thumbprint, with the key that is ended.
    await shell("sam2", "user", "end-key", "sam", second["kid"][:8], "--reason", "lost", "--yes")
    listed = await shell.json("sam", "user", "keys", "sam")
    ended = next(one for one in listed["keys"] if one["kid"] == second["kid"])
    assert ended["not_after"] <= listed["keys"][0]["added_at_ms"] // 1000 + 60


async def test_a_compromised_key_takes_those_that_it_vouched_for_along(shell: Shell) -> None:  # noqa: F811
    await people(shell)
    folder = shell.folder
    await shell("otto", "user", "add-key", "sam", "--new-key", str(folder / "lent.json"))
    otto = (await shell.json("olga", "user", "keys", "otto"))["keys"][0]["kid"]
    ended = await shell.json(
        "olga",
        "user",
        "end-key",
        "otto",
        otto,
        "--reason",
        "stolen",
        "--compromised",
        "--yes",
        "--since",
        (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="seconds"),
    )
    (held,) = ended["holds"]
    assert (held["id"], [part.partition(":")[0] for part in held["parts"]]) == ("sam", ["key"])
    refused = await shell(
        "olga", "user", "set", "otto", "--public-key", str(folder / "otto.json"), "--yes", status=1
    )
    assert "compromised" in refused


async def test_mismatched_key_package_is_refused_before_sending(shell: Shell) -> None:  # noqa: F811
    await people(shell)
    folder = shell.folder
    file = await package(shell, "olga", "sam", "sam2")
    assert "sam's, and not otto's" in await shell(
        "olga", "user", "add-key", "otto", "--package", file, "--yes", status=1
    )
    broken = folder / "broken"
    broken.write_text(json.dumps({"user": "sam"}))
    assert "no package" in await shell("olga", "user", "add-key", "sam", "--package", str(broken), status=1)
    shutil.copy(folder / "sam2.json", folder / "otto2.json")
    assert "the invitation is for sam" in await shell(
        "otto",
        "key",
        "prove",
        str(folder / "otto.json"),
        "--invitation",
        str(folder / "invitation"),
        status=1,
    )
    for wrong in (["--valid", "25h"], ["--valid", "0s"]):
        assert await shell("olga", "user", "invite", "sam", *wrong, status=1 if "25h" in wrong else 2)
    # A key that was refused leaves no file behind.
    new = folder / "suzy.json"
    await shell("sam", "user", "add-key", "otto", "--new-key", str(new), status=1)
    assert not new.exists()
    # The invitation was used: the same package is refused.
    await shell("olga", "user", "add-key", "sam", "--package", file, "--yes")
    again = await shell("olga", "user", "add-key", "sam", "--package", file, "--yes", status=1)
    assert "already" in again


async def test_the_list_of_keys_fits_eighty_columns(
    shell: Shell,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await people(shell)
    await shell("olga", "user", "add-key", "sam", "--new-key", str(shell.folder / "sam2.json"))
    monkeypatch.setattr("ringfence.cli.shared.output.line_width", lambda wide=False: 80)
    table = await shell("olga", "user", "keys", "sam")
    head, _, *rows = table.splitlines()
    assert head.split() == ["key", "kind", "vouched", "for", "by", "counts", "attested", "ends"]
    assert [row.split()[1:3] for row in rows] == [["file", "olga"], ["file", "olga"]]
    assert max(map(len, table.splitlines())) <= 80


async def test_a_thumbprint_that_begins_with_a_hyphen(shell: Shell) -> None:  # noqa: F811
    """One in 64 does. The command as a notice words it, and with its words in another order."""
    await people(shell)
    for kid in ("-gYe", "-h" + "gYes" * 10 + "-", "--" + "gYes" * 10 + "_"):
        for words in (
            ("sam", kid, "--compromised", "--reason", "-gone", "-y"),
            ("--reason", "-gone", "-y", "sam", kid),
            ("--reason", "gone", "-y", "sam", "--", kid),
        ):
            refused = await shell("olga", "user", "end-key", *words, status=1)
            assert f"{kid} is no key of sam" in " ".join(refused.split())
    unknown = await shell(
        "olga", "user", "end-key", "sam", "gYes", "--compromized", "--reason", "gone", status=2
    )
    assert "No such option" in unknown
