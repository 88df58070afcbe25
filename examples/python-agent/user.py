"""The user, Maria: assigns a task to the agent, on her own behalf, and prints its id."""

import asyncio

from ringfence import Administrator, Permission


async def main() -> None:
    scope = [Permission(target="platform", verbs=("read", "deploy"), resources=("env/staging/*",))]
    async with Administrator.connect(key=".ringfence/users/maria.json") as maria:
        print(
            await maria.assign_task("deploy-bot", purpose="roll out build 421", scope=scope, ends_in_s=1800)
        )


asyncio.run(main())
