"""The agent: deploys with a credential for exactly that, gives it back, and finds out what it cannot do.

python examples/python-agent/agent.py TASK
"""

import asyncio
import sys

import httpx

from ringfence import Agent, RequestDeniedError

PLATFORM = "http://127.0.0.1:9001"


async def main(task: str) -> None:
    async with (
        Agent.connect(key=".ringfence/agents/deploy-bot.json") as agent,
        httpx.AsyncClient(base_url=PLATFORM, transport=httpx.AsyncHTTPTransport(retries=5)) as http,
    ):
        # It waits for the sponsor, whom the target demands for the verb `deploy`.
        credential = await agent.request(
            task=task,
            target="platform",
            verbs=["deploy"],
            resources=["env/staging/web"],
            reason="roll out build 421",
            ttl_s=300,
        )
        try:
            answer = await http.put("/env/staging/web", auth=credential.auth())
            print("agent: staging:", answer.status_code, answer.json()["done"])
            answer = await http.put("/env/production/web", auth=credential.auth())
            print("agent: production:", answer.status_code, answer.json()["error"])
        finally:
            # `async with agent.credential(...)` does this by itself, and does not wait for the revoker's answer.
            await agent.release(credential, timeout_s=30)
        answer = await http.put("/env/staging/web", auth=credential.auth())
        print("agent: after the release:", answer.status_code, answer.json()["error"])

        try:
            await agent.request(
                task=task,
                target="platform",
                verbs=["deploy"],
                resources=["env/production/web"],
                reason="roll out to production too",
            )
        except RequestDeniedError as denied:
            print("agent: a credential for production:", denied.code)


asyncio.run(main(sys.argv[1]))
