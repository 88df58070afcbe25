"""The sponsor, Sam: is asked about what his agent wants, and signs an approval of exactly that, or a denial.

A person would look at each question. This one approves what concerns staging alone.
"""

import asyncio

from ringfence import Sponsor


async def main() -> None:
    async with Sponsor.connect(key=".ringfence/users/sam.json") as sam:
        async for pending in sam.watch():
            wanted = [resource for permission in pending.scope for resource in permission.resources]
            print(f"sponsor: {pending.agent} wants {', '.join(wanted)} to {pending.reason}", flush=True)
            if all(resource.startswith("env/staging/") for resource in wanted):
                await sam.approve(pending, "staging is fine")
                print("sponsor: approved", flush=True)
            else:
                await sam.deny(pending, "staging alone")
                print("sponsor: denied", flush=True)


asyncio.run(main())
