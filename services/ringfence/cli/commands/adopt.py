"""`ringfence adopt`: plan, question, steps; `--undo` and `--finish`."""

from __future__ import annotations

import getpass
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ringfence.cli.shared.arguments import check_name, check_target_id
from ringfence.cli.shared.options import AllowOption, IdentityOption, YesOption, confirm, identity
from ringfence.cli.shared.output import kept_file, note, say

if TYPE_CHECKING:
    from ringfence.cli.adopt.steps import Place


_VAULT_PATH: Final = re.compile(r"[\w-]+/data/[\w-]+(?:[./][\w-]+)*#[\w-]+")


def _vault_path(value: str | None) -> str | None:
    if value is not None and not _VAULT_PATH.fullmatch(value):
        raise typer.BadParameter(
            "write it as MOUNT/data/PATH#FIELD, for example secret/data/ringfence/openai#key"
        )
    return value


def adopt(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="The file with the credential, as the scan names it. Without it, the adoption of --target continues.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Take a finding of this output of ringfence scan --json; asks which.",
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option("--field", metavar="TEXT", help="Which credential of the file, by its field."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="TARGET", callback=check_target_id, help="The id of the new target."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Where the secret may be sent, if not to the host of the template. Type it: do not take it from a "
            "file of strangers.",
        ),
    ] = None,
    allow: AllowOption = None,
    trial: Annotated[
        str | None,
        typer.Option(
            "--trial", metavar="TEXT", help="A path at the target that a GET may read, for the trial."
        ),
    ] = None,
    vault: Annotated[
        str | None,
        typer.Option(
            "--vault",
            metavar="PATH",
            callback=_vault_path,
            help="Keep the secret in Vault or OpenBao, at MOUNT/data/PATH#FIELD; otherwise in the folder of secrets.",
        ),
    ] = None,
    vault_token: Annotated[
        Path | None,
        typer.Option(
            "--vault-token",
            metavar="FILE",
            help="The file with your token for Vault. [default: ~/.vault-token]",
        ),
    ] = None,
    wrap: Annotated[
        str | None,
        typer.Option(
            "--wrap",
            metavar="TEXT",
            help="Let the MCP server of FILE start in a sandbox; type its command as it is there. It starts once "
            "without a sandbox, to list its tools.",
        ),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="DIR[:rw]",
            help="With --wrap: a folder that the server sees, such as that of its packages. Repeatable.",
        ),
    ] = None,
    agent: Annotated[
        str,
        typer.Option("--agent", metavar="AGENT", callback=check_name, help="The agent; made if it is new."),
    ] = "my-agent",
    agent_key: Annotated[
        Path | None,
        typer.Option(
            "--agent-key",
            metavar="FILE",
            callback=kept_file,
            help="The agent's key file; made if missing. AGENT.json.",
        ),
    ] = None,
    operator: Annotated[
        Path | None, typer.Option("--operator", metavar="FILE", help="The operator's key file.")
    ] = None,
    sponsor: Annotated[
        Path | None, typer.Option("--sponsor", metavar="FILE", help="The sponsor's key file.")
    ] = None,
    user: Annotated[
        Path | None, typer.Option("--user", metavar="FILE", help="The key file of whom the agent works for.")
    ] = None,
    on_behalf_of: Annotated[
        str | None,
        typer.Option(
            "--on-behalf-of",
            metavar="USER",
            callback=check_name,
            help="Whom the agent works for, where their key file is elsewhere.",
        ),
    ] = None,
    lasts: Annotated[str, typer.Option("--for", metavar="DURATION", help="How long the task lasts.")] = "8h",
    agent_user: Annotated[
        str | None,
        typer.Option(
            "--agent-user",
            metavar="TEXT",
            help="The user of this machine as whom the agent runs; you if not given.",
        ),
    ] = None,
    accept: Annotated[
        str | None,
        typer.Option(
            "--accept-agent-can-read",
            metavar="TEXT",
            help="With --finish: why it is acceptable that the agent's user can read the secret. Audit has the words.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the steps.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Go back to before the adoption of --target.")] = False,
    finish: Annotated[
        bool,
        typer.Option("--finish", help="After the rotation: delete the copy of the old file, and be done."),
    ] = False,
    yes: YesOption = False,
    me: IdentityOption = None,
) -> None:
    """Go from a credential that agents inherit to an agent that works without it, for one target at a time.

    Shows all steps, asks once, and does them: the secret to its place, target, entitlement, agent, task, a trial
    through the gateway, and only then the file without the secret. What is done by another person is printed. Run it
    again to go on after that, or after an interruption.
    """
    from ringfence.cli.adopt.adoption import AdoptFolder, AdoptStoppedError
    from ringfence.cli.adopt.findings import choose_finding
    from ringfence.cli.adopt.plan import Typed, planned
    from ringfence.cli.adopt.steps import Place, Role
    from ringfence.scan.output_guard import protect_process

    protect_process()
    if sum((dry_run, undo, finish)) > 1:
        raise typer.BadParameter("give one of --dry-run, --undo, --finish")
    folder = AdoptFolder()
    for copy in folder.expire_copies():
        note(f"deleted {copy}: it was kept for seven days", "warning")
    given: dict[Role, Path | None] = {"operator": operator, "sponsor": sponsor, "user": user}
    keys = {role: key.absolute() for role, one in given.items() if (key := one or identity(me)) is not None}
    adoption = folder.load(target) if target else None
    if adoption is None and file is None and report is not None and not (undo or finish):
        file, field = choose_finding(report, field, ask=not yes)
    if adoption is None and file is not None and not (undo or finish):
        typed = Typed(
            field,
            target,
            url,
            trial,
            tuple(allow or ()),
            agent,
            agent_key,
            on_behalf_of,
            lasts,
            vault,
            vault_token,
            wrap,
            tuple(mount or ()),
        )
        adoption = planned(file, typed, folder, keys)
    if adoption is None:
        raise AdoptStoppedError(
            "no such adoption has begun; begin with: ringfence adopt FILE, or name its --target"
        )
    place = Place(adoption, folder, keys)
    who = agent_user or getpass.getuser()
    if finish:
        _finish(place, who, accept)
    elif undo:
        _undo(place, yes)
    else:
        _go_on(place, who, dry_run=dry_run, yes=yes)


def _go_on(place: Place, agent_user: str, *, dry_run: bool, yes: bool) -> None:
    """Do all steps that are not done. Raises AdoptStoppedError where it cannot go on now."""
    from ringfence.cli.adopt.adoption import AdoptStoppedError
    from ringfence.cli.adopt.steps import steps_of

    adoption = place.adoption
    say(f"{adoption.title}, {adoption.field} in {adoption.file}: target {adoption.target}", "heading")
    steps = steps_of(place)
    for number, step in enumerate(steps, start=1):
        mark = " (done)" if step.name in adoption.done else ""
        for line, text in enumerate(step.describe(place)):
            say(f"{f'{number}.' if line == 0 else '  '} {text}{mark if line == 0 else ''}")
    if dry_run:
        return
    confirm("Do all this?", yes)
    place.folder.save(adoption)
    for step in steps:
        if step.name in adoption.done:
            continue
        try:
            step.do(place)
        except AdoptStoppedError:
            place.folder.save(adoption)
            note(f"stopped at: {step.name}; go on: ringfence adopt --target {adoption.target}", "warning")
            raise
        adoption.done = (*adoption.done, step.name)
        place.folder.save(adoption)
        say(f"done: {step.name}", "ok")
    _say_what_follows(place, agent_user)


def _say_what_follows(place: Place, agent_user: str) -> None:
    from ringfence.cli.adopt.adoption import LEASE_TTL
    from ringfence.cli.adopt.locations import location_of

    one, location = place.adoption, location_of(place.adoption)
    database = one.kind == "postgres"
    if not one.wrapped:
        how = "logs in by the variables of libpq" if database else "keeps its base URL"
        say(f"The agent's program {how}, and starts so:", "heading")
        say(f"  {shlex.join(one.launch(LEASE_TTL, one.purpose))} COMMAND")
    if one.server:
        where = "in a sandbox" if one.wrapped else "so already"
        say(f"{one.file} starts {one.server[-1]} {where}; restart its client once an hour, with the lease.")
    page = f" at {one.rotate}" if one.rotate else ""
    rotate = "change that password at the server" if database else f"rotate the key{page}"
    new = "If its URL has the old one, write the new one" if database else "Write the new one"
    say(f"Now {rotate}: every reader of {one.file} may have it. {new} to {location}, then run:")
    say(f"  ringfence adopt --target {one.target} --finish")
    if location.readable_by(agent_user):
        if one.wrapped:
            note(
                f"the server cannot read {location} from its sandbox; its client, as {agent_user}, can",
                "warning",
            )
        else:
            note(f"agent_can_read: {agent_user}, as whom the agent runs, can read {location}", "warning")


def _undo(place: Place, yes: bool) -> None:
    from ringfence.cli.adopt.steps import steps_of

    adoption = place.adoption
    confirm(f"Undo the adoption of {adoption.target}?", yes)
    # A step that was begun may have done its work without being marked as done.
    steps = steps_of(place)
    for step in reversed(steps[: len(adoption.done) + 1]):
        step.undo(place)
        adoption.done = tuple(name for name in adoption.done if name != step.name)
        place.folder.save(adoption)
        say(f"undone: {step.name}")
    place.folder.forget(adoption.target)
    say(f"agent {adoption.agent} keeps its name and its key, and nothing at {adoption.target}")


def _finish(place: Place, agent_user: str, accept: str | None) -> None:
    """Raises AdoptStoppedError unless all is done, the key was rotated, and the agent cannot read the new one."""
    from ringfence.cli.adopt.adoption import AdoptStoppedError
    from ringfence.cli.adopt.files import placed_fingerprint
    from ringfence.cli.adopt.locations import location_of
    from ringfence.cli.adopt.steps import steps_of

    one = place.adoption
    if missing := [step.name for step in steps_of(place) if step.name not in one.done]:
        raise AdoptStoppedError(
            f"not done yet: {', '.join(missing)}; go on: ringfence adopt --target {one.target}"
        )
    location = location_of(one)
    placed = placed_fingerprint(one, location, place.folder.fingerprinter)
    if placed is None:
        raise AdoptStoppedError(f"nothing is at {location}; write the new credential there")
    if placed == one.exposed:
        page = f" at {one.rotate}" if one.rotate else ""
        raise AdoptStoppedError(
            f"{location} still has the credential that was in {one.file}; rotate it{page}, and write the new one there"
        )
    if not one.wrapped and location.readable_by(agent_user):
        if accept is None:
            raise AdoptStoppedError(
                f"agent_can_read: {agent_user}, as whom the agent runs, can read {location}. Run the agent as another "
                "user and name it with --agent-user, or accept it with --accept-agent-can-read WORDS"
            )
        # What is revoked is of before the rotation; the reason is what audit keeps.
        reason = f"ringfence adopt --finish: accepted that {agent_user} can read the secret of {one.target}: {accept}"
        place.command("sponsor", ("revoke", "--task", str(one.task), "--reason", reason))
    place.folder.forget(one.target)
    say(f"{one.target} is adopted; the copy of {one.file} is deleted", "ok")
