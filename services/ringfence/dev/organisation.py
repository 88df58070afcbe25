"""A believable small organisation, for `ringfence dev` and `ringfence demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ringfence.client.admin.administrator import Administrator
from ringfence.client.admin.trust_setup import TrustFolder
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.registry import BackendSettings, RequestRule, Role, VerbFloor
from ringfence.model.identity.runners import runner_selector
from ringfence.model.identity.spiffe_ids import Kind, spiffe_id

PLATFORM = "platform"
"""The id of the target `ringfence.dev.demo_target`."""
PLATFORM_AUDIENCE = "https://platform.example"

READ_ALL = Permission(target=PLATFORM, verbs=("read",), resources=("env/**",))
DEPLOY_STAGING = Permission(target=PLATFORM, verbs=("deploy",), resources=("env/staging/*",))
DEPLOY_ALL = Permission(target=PLATFORM, verbs=("deploy",), resources=("env/**",))


@dataclass(frozen=True, slots=True)
class Person:
    """A member of the organisation."""

    id: str
    name: str
    about: str
    """The job, and what it is about, in a few words."""
    roles: tuple[Role, ...] = ()
    entitlements: tuple[Permission, ...] = ()


OPERATOR_ABOUT = "operator: sets up users and targets"
PEOPLE = (
    Person("sam", "Sam Field", "sponsor: accountable for deploy-bot", ("sponsor",), (READ_ALL, DEPLOY_ALL)),
    Person("petra", "Petra Lind", "sponsor: accountable for review-bot", ("sponsor",), (READ_ALL,)),
    Person(
        "maria", "Maria Ortiz", "developer: may read everywhere and deploy to staging, not to production",
        entitlements=(READ_ALL, DEPLOY_STAGING),
    ),
    Person("ali", "Ali Demir", "auditor: reads the trail", ("auditor",)),
)  # fmt: skip

TASK_LIFE_S = 7 * 24 * 3600
"""How long the task of `ringfence dev` lasts: longer than a stack usually runs."""


def key_of(folder: TrustFolder, trust_domain: str, kind: Kind, id: str) -> SigningKey:
    """Return the key of a user, agent or target of the organisation. A missing key is made."""
    path: Path = folder.path / f"{kind}s" / f"{id}.json"
    if not path.exists():
        SigningKey.generate(spiffe_id(trust_domain, kind, id)).save(path)
    return SigningKey.load(path)


async def seed(
    folder: TrustFolder,
    settings: ClientSettings,
    operator: str = "olga",
    *,
    platform_url: str | None = None,
    runner: str | None = None,
) -> None:
    """Create people, target and agents by signed commands. Raises RefusedError, UnavailableError.

    `platform_url`: where the gateway reaches the target; None gives its credentials to agents. `runner`: the runner
    that may start runs of the agents.
    """
    domain = settings.trust_domain
    where = {} if platform_url is None else {"url": platform_url}
    async with Administrator.connect(folder.user_key(operator), settings) as olga:
        for person in PEOPLE:
            await olga.set_user(
                person.id,
                name=person.name,
                roles=person.roles,
                keys=[key_of(folder, domain, "user", person.id)],
                entitlements=person.entitlements,
            )
        await olga.set_target(
            PLATFORM,
            description="deploys builds to staging and production",
            backend=BackendSettings.model_validate({"kind": "jwt", "audience": PLATFORM_AUDIENCE, **where}),
            verbs=[VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor")],
            requests=[
                RequestRule(method="GET", path="/env/{env}/{app}", verb="read", resource="env/{env}/{app}"),
                RequestRule(method="PUT", path="/env/{env}/{app}", verb="deploy", resource="env/{env}/{app}"),
            ],
            delivery="gateway" if platform_url is not None else "agent",
            keys=[key_of(folder, domain, "target", PLATFORM)],
        )
    async with Administrator.connect(folder.user_key("sam"), settings) as sam:
        await sam.register_agent(
            "deploy-bot",
            description="deploys builds",
            keys=[key_of(folder, domain, "agent", "deploy-bot")],
            ceiling=[READ_ALL, DEPLOY_ALL],
            attestation=_runs_by(runner, domain, "deploy-bot"),
        )
    async with Administrator.connect(folder.user_key("petra"), settings) as petra:
        await petra.register_agent(
            "review-bot",
            description="reads what is deployed, for reviews",
            keys=[key_of(folder, domain, "agent", "review-bot")],
            ceiling=[READ_ALL],
            attestation=_runs_by(runner, domain, "review-bot"),
        )


def _runs_by(runner: str | None, domain: str, agent_id: str) -> list[AttestationSelector]:
    return [runner_selector(domain, runner, agent_id)] if runner is not None else []


async def task_to_try(folder: TrustFolder, settings: ClientSettings, task_id: str) -> str:
    """Return the task of a former start, or a new one like it if that is over. Raises as `assign_first_task`."""
    async with Administrator.connect(folder.user_key("maria"), settings) as maria:
        found = (await maria.directory()).task(task_id)
        now_s = maria.connection.clock.now_ms() // 1000
    if found is not None and found.state.status == "active" and found.state.not_after > now_s:
        return task_id
    return await assign_first_task(folder, settings)


async def assign_first_task(folder: TrustFolder, settings: ClientSettings) -> str:
    """Let Maria assign deploy-bot a task on her own behalf. Returns its id. Raises RefusedError, UnavailableError."""
    async with Administrator.connect(folder.user_key("maria"), settings) as maria:
        return await maria.assign_task(
            "deploy-bot",
            purpose="deploy builds to staging",
            scope=[READ_ALL, DEPLOY_STAGING],
            ends_in_s=TASK_LIFE_S,
        )
