"""`ringfence target`: the systems that agents act on."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import ValidationError

from ringfence.cli.commands.target_templates import TEMPLATES, Template
from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_target_id
from ringfence.cli.shared.changes import Replacement, check_unchanged
from ringfence.cli.shared.command_results import print_accepted
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    KeyDaysOption,
    NewKeyOption,
    PublicKeyOption,
    ReasonOption,
    WideOption,
    YesOption,
    confirm,
    credential_life_s,
    identity,
    keep_key_if_accepted,
    key_records,
    run,
    settings,
    wants_json,
)
from ringfence.cli.shared.output import note
from ringfence.cli.shared.records import list_records, show_record, target_fields
from ringfence.client.errors import ApiError, checked
from ringfence.kernel.base.text import Lines
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.registry import (
    ActionClass,
    ApprovalClass,
    BackendSettings,
    Delivery,
    FloorKey,
    GitRule,
    McpRule,
    ModelRule,
    RequestRule,
    TargetState,
    VerbFloor,
)
from ringfence.model.http_targets import RequestMap, RequestMapError
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.target_settings import CREDENTIAL_KINDS, default_delivery, delivery_problem

if TYPE_CHECKING:
    from ringfence.client.admin.command_client import Accepted

app = typer.Typer(help="Systems that agents act on: verbs and approval floors.", no_args_is_help=True)

TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", callback=check_target_id, help="The target's id.")
]
_FLOORS: tuple[ApprovalClass, ...] = get_args(ApprovalClass)
_CLASSES: tuple[ActionClass, ...] = get_args(ActionClass)
_FLOOR_KEYS: tuple[FloorKey, ...] = get_args(FloorKey)
_KINDS = " or ".join(", ".join(CREDENTIAL_KINDS).rsplit(", ", 1))
_GATEWAY_READS_WITHIN_S, _ASK_AGAIN_S = 3.0, 0.1
_GAPS_SHOWN = 20
_SETTING = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""A valid setting name. The backends define which settings exist."""
_REQUEST = re.compile(
    r"(\S+) (\S+) (\S+) (\S+)"
    r"((?: (?:(?:query|body|argument):[^\s=]+=\S+|message:[^\s=]+(?:=\S+)?|model:[a-z]+(?:=server-tools)?"
    r"|git:[a-z-]+))*)"
)


@app.command()
def add(
    target: TargetArgument,
    description: Annotated[str, typer.Option("--description", help="What it is.")],
    verb: Annotated[
        list[str] | None,
        typer.Option(
            "--verb",
            metavar="VERB[=FLOOR]",
            help=f"A verb, and the approval that no policy goes below: {', '.join(_FLOORS)}. Repeatable; with a "
            "template, more verbs or other floors.",
        ),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            "--ask",
            metavar="VERB[=CLASS]",
            help="Each single action of this verb through a gateway waits for a person: sponsor, where none is named, "
            "second_person, operator. Repeatable.",
        ),
    ] = None,
    approver_key: Annotated[
        list[str] | None,
        typer.Option(
            "--approver-key",
            metavar="VERB=KIND",
            help="The kind of key that may approve this verb (also in grants, single actions and break glass): "
            "attested (a passkey with a verified attestation) or file (a key file). Repeatable.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help=f"Backend and verbs as they usually are: {', '.join(TEMPLATES)}."),
    ] = None,
    openapi: Annotated[
        Path | None,
        typer.Option(
            "--openapi",
            metavar="FILE",
            help="Propose verbs and requests from the OpenAPI document of an HTTP API, and ask first. What cannot be "
            "told by method and path stays denied.",
        ),
    ] = None,
    openapi_tag: Annotated[
        list[str] | None,
        typer.Option(
            "--openapi-tag", metavar="TAG", help="Only operations with this tag of the document. Repeatable."
        ),
    ] = None,
    request: Annotated[
        list[str] | None,
        typer.Option(
            "--request",
            metavar="'METHOD PATH VERB RESOURCE [query:NAME=VALUE,...] [body:NAME=VALUE,...]', or "
            "'MCP PATH VERB RESOURCE message:METHOD[=TOOL] [argument:NAME=VALUE,...]', or "
            "'POST PATH VERB RESOURCE model:openai|anthropic[=server-tools]', or "
            "'GIT PATH VERB RESOURCE git:OPERATION'",
            help="Which requests are which verb, e.g. 'GET /envs/{name} read env/{name}'. Repeatable; the first "
            "that matches counts, and those of a template come last.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            help=f"How its credentials are made: {_KINDS}; as the template says, or jwt.",
        ),
    ] = None,
    audience: Annotated[
        str | None, typer.Option("--audience", help="The aud of its tokens; its SPIFFE ID where not given.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="Where agents reach it; where Ringfence does, if not given.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            metavar="NAME=VALUE",
            help="A setting of its backend, as in docs/targets/. Repeatable.",
        ),
    ] = None,
    max_ttl: Annotated[
        str, typer.Option("--max-ttl", metavar="DURATION", help="The longest life of a credential.")
    ] = "1h",
    delivery: Annotated[
        Delivery | None,
        typer.Option(
            "--delivery",
            help="gateway denies requests for delivery to the agent; the default where requests are mapped and a "
            "gateway can inject the credential, else agent.",
        ),
    ] = None,
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: KeyDaysOption = 365,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway",
            help="Also with a backend that only the issuer has, by a package of its own; or without --address, where "
            "agents reach it as Ringfence does.",
        ),
    ] = False,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a target, or replace it. The resource server uses the target's key to call introspection. As an operator.

    Refuses settings that the backend does not know. For an existing target, shows all changes and asks first: what you
    do not repeat is removed.
    """
    id = spiffe_id(settings().trust_domain, "target", target)
    if openapi is not None and template is not None:
        raise typer.BadParameter("give --openapi or --template, not both", param_hint="--openapi")
    base = _proposed_map(openapi, openapi_tag or (), yes) if openapi is not None else _template(template)
    verbs = _with_action_approval(_merge_verbs(base, verb or ()), ask or ())
    verbs = _with_approver_keys(verbs, approver_key or ())
    requests = [*map(_parse_request_rule, request or ()), *(base.requests if base else ())]
    _check_map(requests, verbs)
    kind = backend if backend is not None else base.backend if base else "jwt"
    own = (dict(base.settings) if base and kind == base.backend else {}) | _parse_settings(setting or ())
    own |= {} if address is None else {"address": address}
    made_of = _backend_settings(kind, audience, own)
    _check_backend(made_of, anyway)
    max_ttl_s = credential_life_s(max_ttl)
    delivery = delivery or default_delivery(made_of, mapped=bool(requests))
    if wrong := delivery_problem(made_of, delivery):
        raise typer.BadParameter(wrong, param_hint="--delivery")
    keys = key_records(public_key, new_key, id, key_days)

    async def work() -> tuple[Accepted, dict[str, Any], str | None]:
        async with connect.administrator(identity(me)) as administrator:
            entry = (await administrator.directory()).target(target)
            with checked("the target"):
                after = TargetState(
                    target_id=target,
                    description=description,
                    backend=made_of,
                    verbs=tuple(verbs),
                    requests=tuple(requests),
                    max_ttl_s=max_ttl_s,
                    delivery=delivery,
                    keys=keys,
                    status="active",
                )
            details: dict[str, Any] = {}
            if entry is not None and (replacement := _replacement(entry.state, after)):
                question = f"Replace target {target} so?"
                details = await replacement.ask(question, identity(me), yes=yes, quiet=wants_json(as_json))
                await check_unchanged(administrator, "target", target, entry)
            accepted = await administrator.set_target(
                target,
                description=description,
                verbs=verbs,
                backend=made_of,
                requests=requests,
                max_ttl_s=max_ttl_s,
                delivery=delivery,
                keys=keys,
                anyway=anyway,
                revision=entry.named_revision if entry else 0,
            )
        gap = None
        if delivery == "gateway":
            gap = await _gateway_gap(target, entry.revision + 1 if entry else 1, identity(me))
        return accepted, details, gap

    with keep_key_if_accepted(new_key):
        accepted, details, gap = run(work())
    key_file_field = {"key_file": str(new_key)} if new_key else {}
    print_accepted(accepted, f"target {target} set", wants_json(as_json), details, **key_file_field)
    if gap:
        note(f"no agent can use it yet: {gap}", "warning")
    if _tells_address(kind) and "address" not in own:
        note(
            f"no --address: agents are told the one that Ringfence itself connects to, in RINGFENCE_BACKENDS_ACCESS of "
            f"issuer and revoker (docs/targets/{kind}.md); where they reach it elsewhere, add it again with --address "
            "HOST:PORT",
            "warning",
        )


async def _gateway_gap(target: str, revision: int, me: Path | None) -> str | None:
    """Return why the configured gateway cannot send requests to a target, and what to do; None if it can.

    `revision`: that of the record which the gateway must have. It is waited for.
    """
    from ringfence.client.reports.read_api import ReadApi

    answer: dict[str, Any] = {}
    async with ReadApi(me, timeout_s=_GATEWAY_READS_WITHIN_S) as api:
        try:
            async with asyncio.timeout(_GATEWAY_READS_WITHIN_S):
                while answer.get("revision", 0) < revision:
                    try:
                        answer = await api.get("gateway", "targets", target)
                    except ApiError as error:
                        if error.status != HTTPStatus.NOT_FOUND:
                            raise
                    await asyncio.sleep(_ASK_AGAIN_S)
        except ApiError as error:
            return f"{error}; start one: ringfence serve gateway"
        except TimeoutError:
            return "the gateway has not read its record yet; see later: ringfence doctor"
    problem: str | None = answer["problem"]
    return problem


@app.command()
def remove(
    target: TargetArgument,
    reason: ReasonOption,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Issue nothing more for a target, and end its leases. As an operator."""
    confirm(f"Remove target {target} and end all its leases?", yes)

    accepted = connect.administer(identity(me), lambda person: person.remove_target(target, reason=reason))
    print_accepted(accepted, f"target {target} removed; its leases end", wants_json(as_json))


@app.command(name="list")
def list_targets(wide: WideOption = False, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List targets."""
    list_records("target", identity(me), wants_json(as_json), wide)


@app.command()
def show(target: TargetArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Show one target."""
    show_record("target", target, identity(me), wants_json(as_json))


@app.command(name="ssh-helper")
def ssh_helper() -> None:
    """Print the program for hosts that agents reach by ssh. docs/targets/ssh.md says where it goes."""
    # Not imported: the helper on such a host needs nothing of Ringfence, nor does the host need the services' packages.
    sys.stdout.write(files("ringfence").joinpath("backends", "ssh", "host_helper.py").read_text())


def _parse_verb(text: str) -> VerbFloor:
    verb, _, floor = text.partition("=")
    if floor and floor not in _FLOORS:
        raise typer.BadParameter(f"{text!r}: {floor!r} is no floor; write one of {', '.join(_FLOORS)}")
    try:
        return VerbFloor(verb=verb, floor=floor or "none")
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r}: {explain(error)}") from None


def _parse_request_rule(text: str) -> RequestRule:
    match = _REQUEST.fullmatch(text)
    if match is None:
        raise typer.BadParameter(
            f"{text!r}: write four words, 'METHOD PATH VERB RESOURCE', and conditions after them: query:NAME=VALUE, "
            "body:NAME=VALUE, message:METHOD[=TOOL], argument:NAME=VALUE, model:API[=server-tools], "
            "git:OPERATION"
        )
    method, path, verb, resource, conditions = match.groups()
    query, body = (_parse_conditions(where, conditions) for where in ("query", "body"))
    try:
        mcp, model = _parse_mcp_rule(text, conditions), _parse_model_rule(text, conditions)
        git = _parse_git_rule(text, conditions)
        return RequestRule(
            method=method,
            path=path,
            query=query,
            body=body,
            mcp=mcp,
            model=model,
            git=git,
            verb=verb,
            resource=resource,
        )
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r}: {explain(error)}") from None


def _parse_mcp_rule(text: str, conditions: str) -> McpRule | None:
    """Parse a rule for MCP messages. Raises ValidationError."""
    details = [one.removeprefix("message:") for one in conditions.split() if one.startswith("message:")]
    arguments = _parse_conditions("argument", conditions)
    if len(details) > 1 or (arguments and not details):
        raise typer.BadParameter(
            f"{text!r}: write one message:METHOD[=TOOL], and conditions on arguments with it"
        )
    if not details:
        return None
    method, _, name = details[0].partition("=")
    return McpRule(method=method, name=name or None, arguments=arguments)


def _parse_model_rule(text: str, conditions: str) -> ModelRule | None:
    """Parse a rule for requests to models. Raises ValidationError."""
    found = [one.removeprefix("model:") for one in conditions.split() if one.startswith("model:")]
    if len(found) > 1:
        raise typer.BadParameter(f"{text!r}: write one model:API[=server-tools]")
    api, _, more = found[0].partition("=") if found else ("", "", "")
    return ModelRule.model_validate({"api": api, "server_tools": bool(more)}) if found else None


def _parse_git_rule(text: str, conditions: str) -> GitRule | None:
    """Parse a rule for Git servers. Raises ValidationError."""
    found = [one.removeprefix("git:") for one in conditions.split() if one.startswith("git:")]
    if len(found) > 1:
        raise typer.BadParameter(f"{text!r}: write one git:OPERATION")
    return GitRule.model_validate({"operation": found[0]}) if found else None


def _parse_conditions(where: str, text: str) -> dict[str, tuple[str, ...]] | None:
    conditions: dict[str, tuple[str, ...]] = {}
    for condition in text.split():
        kind, _, rest = condition.partition(":")
        if kind == where:
            name, _, values = rest.partition("=")
            if name in conditions:
                raise typer.BadParameter(
                    f"{kind}:{name} is there twice; write {kind}:{name}=VALUE,VALUE for either",
                    param_hint="--request",
                )
            conditions[name] = tuple(values.split(","))
    return conditions or None


def _check_map(requests: list[RequestRule], verbs: list[VerbFloor]) -> None:
    try:
        RequestMap(requests).check_order(verbs)
    except RequestMapError as error:
        raise typer.BadParameter(str(error), param_hint="--request") from None


def _proposed_map(file: Path, tags: Sequence[str], yes: bool) -> Template:
    """Return the map that a document proposes, shown and confirmed."""
    from ringfence.cli.commands.openapi_map import read_openapi

    found = read_openapi(file, tags)
    template = found.template
    note(f"{len(template.requests)} operations have a rule:")
    counts = Counter(rule.verb for rule in template.requests)
    note(Lines(f"  {verb} ({template.verbs[verb]}): {count}" for verb, count in sorted(counts.items())))
    if found.gaps:
        shown, more = found.gaps[:_GAPS_SHOWN], len(found.gaps) - _GAPS_SHOWN
        note(f"{len(found.gaps)} have none, and stay denied:", "warning")
        note(Lines(f"  {gap}" for gap in (*shown, *([f"and {more} more"] if more > 0 else []))))
    if found.server is not None:
        note(f"the document names {found.server}; the gateway sends requests where --setting url= says")
    confirm("Use this map?", yes)
    return template


def _template(name: str | None) -> Template | None:
    if name is not None and name not in TEMPLATES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(TEMPLATES)}", param_hint="--template")
    return TEMPLATES[name] if name is not None else None


def _merge_verbs(template: Template | None, texts: Iterable[str]) -> list[VerbFloor]:
    """Return the verbs of the template and those given. A given one replaces the template's."""
    template_verbs = template.verbs if template else {}
    verbs = {verb: VerbFloor(verb=verb, floor=floor) for verb, floor in template_verbs.items()}
    parsed = [_parse_verb(text) for text in texts]
    _check_no_duplicates([floor.verb for floor in parsed], "--verb")
    verbs |= {floor.verb: floor for floor in parsed}
    if not verbs:
        raise typer.BadParameter("name at least one verb, or a template", param_hint="--verb")
    return list(verbs.values())


def _with_action_approval(verbs: list[VerbFloor], texts: Iterable[str]) -> list[VerbFloor]:
    """Return the verbs, and mark those whose every action needs approval by a person."""
    asks = [_parse_action_approval(text) for text in texts]
    _check_no_duplicates([verb for verb, _ in asks], "--ask")
    classes = dict(asks)
    if unknown := classes.keys() - {verb.verb for verb in verbs}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: no verb of this target", param_hint="--ask")
    return [verb.model_copy(update={"ask": classes.get(verb.verb, verb.ask)}) for verb in verbs]


def _with_approver_keys(verbs: list[VerbFloor], texts: Iterable[str]) -> list[VerbFloor]:
    """Return the verbs, and mark those whose approvals count by one kind of key alone."""
    parsed = [_parse_approver_key(text) for text in texts]
    _check_no_duplicates([verb for verb, _ in parsed], "--approver-key")
    kinds = dict(parsed)
    if unknown := kinds.keys() - {verb.verb for verb in verbs}:
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: no verb of this target", param_hint="--approver-key"
        )
    return [verb.model_copy(update={"key": kinds.get(verb.verb, verb.key)}) for verb in verbs]


def _parse_approver_key(text: str) -> tuple[str, FloorKey]:
    verb, _, kind = text.partition("=")
    for one in _FLOOR_KEYS:
        if one == kind:
            return verb, one
    raise typer.BadParameter(
        f"{text!r}: write VERB=KIND, one of {', '.join(_FLOOR_KEYS)}", param_hint="--approver-key"
    )


def _check_no_duplicates(names: list[str], option: str) -> None:
    """Refuse duplicate verbs: the last would count, and might be the weaker one."""
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise typer.BadParameter(f"{', '.join(twice)} is there twice", param_hint=option)


def _parse_action_approval(text: str) -> tuple[str, ActionClass]:
    verb, _, action_class = text.partition("=")
    for one in _CLASSES:
        if one == (action_class or _CLASSES[0]):
            return verb, one
    raise typer.BadParameter(f"{text!r}: write VERB=CLASS, one of {', '.join(_CLASSES)}", param_hint="--ask")


def _parse_settings(texts: Iterable[str]) -> dict[str, str | int]:
    settings: dict[str, str | int] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not _SETTING.fullmatch(name):
            raise typer.BadParameter(f"{text[:64]!r}: write NAME=VALUE", param_hint="--setting")
        if name in BackendSettings.model_fields:
            option = "--backend" if name == "kind" else f"--{name}"
            raise typer.BadParameter(f"{name} is not given so: write {option} VALUE", param_hint="--setting")
        if name in settings:
            raise typer.BadParameter(f"{name} is there twice: say which counts", param_hint="--setting")
        # A value that would be written differently is a word that looks like a number. No setting is a longer one.
        is_number = len(value) < 20 and value.isdecimal() and str(int(value)) == value
        settings[name] = int(value) if is_number else value
    return settings


def _backend_settings(kind: str, audience: str | None, own: dict[str, str | int]) -> BackendSettings:
    from ringfence.client.admin.target_backends import unknown_backend_message

    try:  # further fields belong to the kind
        return BackendSettings.model_validate({"kind": kind, "audience": audience, **own})
    except ValidationError as error:
        if any(one["loc"][:1] == ("kind",) for one in error.errors(include_url=False)):
            raise typer.BadParameter(unknown_backend_message(kind), param_hint="--backend") from None
        raise typer.BadParameter(f"{kind!r}: {explain(error)}", param_hint="--backend") from None


def _check_backend(backend: BackendSettings, anyway: bool) -> None:
    """Raise typer.BadParameter where no issuer could make credentials with these settings."""
    from ringfence.client.admin.target_backends import backend_problem

    if wrong := backend_problem(backend, anyway=anyway):
        hint = "--backend" if backend.kind not in CREDENTIAL_KINDS else "--setting"
        raise typer.BadParameter(wrong, param_hint=hint)
    if _tells_address(backend.kind) and "address" not in (backend.model_extra or {}) and not anyway:
        raise typer.BadParameter(
            f"say where agents reach it, as HOST:PORT; a credential of backend {backend.kind} tells them. Where they "
            "reach it by the address that Ringfence itself connects to, add --anyway",
            param_hint="--address",
        )


def _tells_address(kind: str) -> bool:
    """Return whether credentials of a kind tell agents the target's address. Unknown for kinds of other packages."""
    return kind in CREDENTIAL_KINDS and CREDENTIAL_KINDS[kind].tells_address


def _replacement(before: TargetState, after: TargetState) -> Replacement | None:
    """Return what changes in a target; None where nothing does."""
    replacement = Replacement(f"target {after.target_id}")
    old, new = target_fields(before), target_fields(after)
    for name in old.keys() | new.keys():
        if old.get(name, "") != new.get(name, ""):
            replacement.values(name, _lines(old.get(name, "")), _lines(new.get(name, "")))
    if before.status == "removed":
        replacement.warnings.append(f"{after.target_id} was removed: this makes it active again")
    elif gone := {one.verb for one in before.verbs} - {one.verb for one in after.verbs}:
        replacement.warnings.append(
            f"it has no verb {', '.join(sorted(gone))} any more; what holds it keeps it until its lease ends"
        )
    if (before.delivery, after.delivery) == ("gateway", "agent"):
        replacement.warnings.append("wider: from then on agents may get its credentials themselves")
    elif before.delivery != after.delivery:
        replacement.warnings.append("narrower: what agents hold already stays with them until its lease ends")
    return replacement if replacement.lines else None


def _lines(text: str) -> list[str]:
    if not text:
        return []
    return text.split("\n") if isinstance(text, Lines) else [text]
