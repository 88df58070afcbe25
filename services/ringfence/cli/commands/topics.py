"""`ringfence topics`: create topics, check them against the contract, show the access rights that each service
needs.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import note, print_json, print_table, say
from ringfence.cli.shared.progress import progress
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.base.text import Lines
from ringfence.kernel.kafka.acls import PARTIES, Acl, Party, acls, commands

if TYPE_CHECKING:
    from ringfence.kernel.kafka.topics_admin import TopicDifference

app = typer.Typer(help="Create the topics, check them, and say who may use them.", no_args_is_help=True)


@app.command()
def apply(as_json: JsonOption = False) -> None:
    """Create every topic that is not there yet, and set what `check` finds to differ on those that are.

    A consumer group that has read further than a restored topic goes is set back to its end, while no service runs.
    Left to you, and named: partitions, replicas, and what is kept longer than the contract asks.
    """
    from ringfence.kernel.kafka.topics_admin import TopicsAdmin

    async def work() -> tuple[list[str], list[TopicDifference], list[TopicDifference], list[str]]:
        with progress("connecting to Kafka", as_json=as_json) as line:
            async with TopicsAdmin(load(ServiceSettings)) as admin:
                line.say("creating topics, and waiting until a broker shows them")
                created = await admin.apply()
                line.say("comparing the topics with the contract")
                changed, left = await admin.set_right()
                return created, changed, left, (await admin.replication()).warnings()

    created, unchanged, unknown, warnings = run(work())
    for one in unknown:
        note(
            f"warning: {one.what} of {one.topic} is {one.found}, not {one.expected}, and was left so; to change it is "
            "for Kafka's own tools",
            "warning",
        )
    for warning in warnings:
        note(f"warning: {warning}", "warning")
    if wants_json(as_json):
        print_json(
            {
                "created": created,
                "set": list(map(asdict, unchanged)),
                "left": list(map(asdict, unknown)),
                "warnings": warnings,
            }
        )
        return
    lines = [f"created {name}" for name in created]
    lines += [f"set {one.what} of {one.topic} to {one.expected}; it was {one.found}" for one in unchanged]
    say(Lines(lines) or "all topics are there")


@app.command()
def check(as_json: JsonOption = False) -> None:
    """Compare the topics with the contract, and consumer groups with the topics; exit 1 if one differs."""
    from ringfence.kernel.kafka.topics_admin import TopicsAdmin

    async def work() -> list[TopicDifference]:
        with progress("comparing the topics with the contract", as_json=as_json):
            async with TopicsAdmin(load(ServiceSettings)) as admin:
                return await admin.check()

    differences = run(work())
    if wants_json(as_json):
        print_json({"differences": [asdict(one) for one in differences]})
    else:
        print_table(
            ["topic", "what", "expected", "found"],
            ((one.topic, one.what, one.expected, one.found) for one in differences),
            empty="all topics are as the contract says",
        )
    if differences:
        raise typer.Exit(1)


@app.command("acls")
def show_acls(
    principal: Annotated[
        list[str] | None,
        typer.Option(
            "--principal",
            metavar="PARTY=PRINCIPAL",
            help="Who a party is to Kafka, e.g. 'policy=User:CN=policy'; else User:PREFIX-PARTY. Repeatable.",
        ),
    ] = None,
    grant: Annotated[bool, typer.Option("--apply", help="Create them on the broker.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the ACLs that each party needs on Kafka, as commands of kafka-acls.sh; --apply creates them.

    Parties are the services, and agents, users, operators and the siem. They need these rights and no others. Even for
    a party with Write, signatures decide what counts.
    """
    settings = load(ServiceSettings)
    required = acls(settings.topic_prefix)
    principals = _principals(principal or [], settings.topic_prefix)
    if grant:
        from ringfence.kernel.kafka.topics_admin import TopicsAdmin

        async def work() -> int:
            async with TopicsAdmin(settings) as admin:
                return await admin.grant(required, principals)

        count = run(work())
        if not wants_json(as_json):
            say(f"{count} ACLs are there")
            return
    if wants_json(as_json):
        print_json({"acls": [_acl(one, principals) for one in required]})
    else:
        for command in commands(required, principals):
            say(command)


def _principals(options: list[str], prefix: str) -> dict[Party, str]:
    principals: dict[Party, str] = {party: f"User:{prefix}-{party}" for party in PARTIES}
    for one in options:
        name, _, principal = one.partition("=")
        party = next((party for party in PARTIES if party == name), None)
        if party is None or ":" not in principal:
            raise typer.BadParameter(
                f"{one!r}: say PARTY=PRINCIPAL, the party one of {', '.join(PARTIES)}, the principal as in User:alice"
            )
        principals[party] = principal
    return principals


def _acl(acl: Acl, principals: dict[Party, str]) -> dict[str, str]:
    return {
        "party": acl.party,
        "principal": principals[acl.party],
        "operation": acl.operation.name,
        "resource_type": acl.resource_type.name,
        "name": acl.name,
        "pattern_type": acl.pattern.name,
    }
