"""The sign page in Firefox: a person enrols there, and approves. Everything else is tried in Chromium."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.passkeys.firefox import firefox
from tests.passkeys.organisation import Organisation
from tests.passkeys.test_signing import waiting, write


async def test_a_person_enrols_and_approves_in_firefox(organisation: Organisation, tmp_path: Path) -> None:
    realm = organisation.realm
    pia = realm.name("pia")
    await organisation.add_user(pia)
    profile = tmp_path / "profile"
    profile.mkdir()
    async with firefox(profile) as browser:
        await browser.open(await organisation.invitation(pia))
        await browser.click("Make a passkey")
        await browser.click("Prove it")
        await browser.heading("The passkey is ready")
        package = tmp_path / "package.json"
        package.write_text(await browser.value("textarea"))
        added = await organisation.add_key(pia, package)
        assert added["kid"]
        async with realm.as_operator() as olga:
            await olga.transfer_agent(realm.agent, sponsor=pia, without_consent=True)
        async with realm.as_agent() as agent:
            request = asyncio.create_task(write(organisation, agent))
            command = await organisation.run(
                "approvals", "approve", await waiting(organisation, pia), as_user=pia
            )
            await browser.open(await command.link())
            await browser.click("Approve")
            await browser.text("It was handed to the program that asked")
            assert (await command.result())["verdict"] == "approved"
            assert (await request).lease_id
