"""`ringfence agent set-attestation`, and the notation of instance selectors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_name
from ringfence.cli.shared.changes import Replacement, check_unchanged
from ringfence.cli.shared.command_results import print_accepted
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    YesOption,
    duration_s,
    identity,
    run,
    wants_json,
)
from ringfence.kernel.base.settings import BusSettings, load
from ringfence.kernel.base.strict_json import once
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.enrolment import AttestationSelector
from ringfence.model.identity.attestation import selector_id
from ringfence.model.identity.runners import runner_issuer
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.unknown_fields import describe_unknown, names_of, unknown_fields

if TYPE_CHECKING:
    from ringfence.client.admin.command_client import Accepted

_RUNNER = "runner="
"""With a runner's name after it, the first word of a selector for runs."""

SelectorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--selector",
        metavar="SELECTOR",
        help="Which running instances may enrol a key: 'ISSUER CLAIM=PATTERN ...', or 'runner=NAME' for the agent's "
        "runs, then optionally key-bound and life=1h; a JSON object; or @FILE with a JSON list. Repeatable.",
    ),
]


def set_attestation(
    agent: Annotated[str, typer.Argument(metavar="AGENT", callback=check_name, help="The agent's id.")],
    selector: SelectorOption = None,
    none: Annotated[bool, typer.Option("--none", help="No instance may enrol any more.")] = False,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which running instances of an agent may enrol a key of their own. As its sponsor or an operator.

    What is said replaces what was. First shows which selectors that takes away, and asks: leases of instances that
    enrolled by one of those end, and they get nothing new.
    """
    from ringfence.client.admin.preview import Loss

    if bool(selector) == none:
        raise typer.BadParameter("say all of them with --selector, or --none", param_hint="--selector")
    selectors = parse_selectors(selector, agent)

    async def work() -> tuple[Accepted, dict[str, Any]]:
        from ringfence.client.admin.unknown_subjects import unknown_subject

        async with connect.administrator(identity(me)) as administrator:
            directory = await administrator.directory()
            entry = directory.agent(agent)
            if entry is None:
                raise unknown_subject(directory, "agent", agent)
            details: dict[str, Any] = {}
            kept_ids = {selector_id(one) for one in selectors}
            if gone := {selector_id(one) for one in entry.state.attestation} - kept_ids:
                replacement = Replacement(f"selectors of {agent}")
                replacement.values(
                    "selectors",
                    map(show_selector, entry.state.attestation),
                    map(show_selector, selectors),
                )
                replacement.losses.append(Loss(agent=agent, selectors=frozenset(gone)))
                question = f"Set the selectors of {agent} so?"
                details = await replacement.ask(question, identity(me), yes=yes, quiet=wants_json(as_json))
                await check_unchanged(administrator, "agent", agent, entry)
            return await administrator.set_attestation(
                agent, selectors, revision=entry.named_revision
            ), details

    accepted, details = run(work())
    print_accepted(accepted, f"{len(selectors)} selectors of {agent} set", wants_json(as_json), details)


def parse_selectors(given: list[str] | None, agent: str | None = None) -> tuple[AttestationSelector, ...]:
    """Parse selectors from repeated options. Raises typer.BadParameter, which names the error.

    `agent`: whose selectors they are. A runner's selector names it, where it is not written out.
    """
    selectors: list[AttestationSelector] = []
    for text in given or ():
        if text.startswith("@"):
            try:
                listed = json.loads(Path(text[1:]).read_text(), object_pairs_hook=once)
            except (OSError, ValueError) as error:
                raise typer.BadParameter(f"{text}: {error}", param_hint="--selector") from None
            selectors += [_selector(one, text) for one in (listed if isinstance(listed, list) else [listed])]
        else:
            selectors.append(_selector(_fields(text, agent), text))
    return tuple(selectors)


def show_selector(selector: AttestationSelector) -> str:
    """Return a selector in the notation of the command line."""
    issuer = selector.issuer if selector.runner is None else f"{_RUNNER}{selector.runner}"
    words = [issuer, *(f"{name}={value}" for name, value in selector.claims.items())]
    words += ["key-bound"] if selector.key_bound and selector.runner is None else []
    details = shlex.join([*words, f"life={selector.max_life_s}s"])
    unknown = unknown_fields(selector)
    return f"{details} (lets nobody in, as {names_of(unknown)} is not known here)" if unknown else details


def _fields(text: str, agent: str | None) -> Any:
    try:
        if text.startswith("{"):
            return json.loads(text, object_pairs_hook=once)
        issuer, *words = shlex.split(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--selector") from None
    fields: dict[str, Any] = {"issuer": issuer, "claims": {}}
    if issuer.startswith(_RUNNER):
        fields = _runner_fields(issuer.removeprefix(_RUNNER), agent)
        if any(word.startswith("sub=") for word in words):
            fields["claims"] = {}
    given_names: set[str] = set()
    for word in words:
        name, equals, value = word.partition("=")
        if name in given_names:  # the last would count, and the limits of the others would be lost
            raise typer.BadParameter(f"{text!r}: {name} is there twice", param_hint="--selector")
        given_names.add(name)
        if word == "key-bound":
            fields["key_bound"] = True
        elif name == "life" and equals:
            try:
                fields["max_life_s"] = duration_s(value)
            except typer.BadParameter as error:
                raise typer.BadParameter(
                    f"{text!r}: life: {error.message}", param_hint="--selector"
                ) from None
        elif name and equals:
            fields["claims"][name] = value
        else:
            raise typer.BadParameter(
                f"{text!r}: {word!r} is no CLAIM=PATTERN, key-bound or life=DURATION", param_hint="--selector"
            )
    return fields


def _runner_fields(name: str, agent: str | None) -> dict[str, Any]:
    trust_domain = load(BusSettings).trust_domain
    return {
        "issuer": runner_issuer(trust_domain, name),
        "claims": {"sub": spiffe_id(trust_domain, "agent", agent)} if agent else {},
        "key_bound": True,
        "runner": name,
    }


def _selector(fields: Any, text: str) -> AttestationSelector:
    try:
        selector = AttestationSelector.model_validate(fields)
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r}: {explain(error)}", param_hint="--selector") from None
    if unknown := unknown_fields(selector):
        details = describe_unknown(unknown, f"the selector for {selector.issuer}")
        raise typer.BadParameter(f"{text!r}: {details}", param_hint="--selector")
    return selector
