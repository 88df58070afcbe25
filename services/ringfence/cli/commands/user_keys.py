"""`ringfence user invite`, `add-key`, `endorse-key`, `keys` and `end-key`: the keys of people."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_name
from ringfence.cli.shared.command_results import print_accepted
from ringfence.cli.shared.options import (
    AsOption,
    IdentityOption,
    JsonOption,
    KeyDaysOption,
    NewKeyOption,
    PasskeyOption,
    ReasonOption,
    WideOption,
    YesOption,
    check_folder,
    confirm,
    duration_s,
    identity,
    keep_key_if_accepted,
    moment_ms,
    run,
    settings,
    signer,
    signs_on_page,
    wants_json,
)
from ringfence.cli.shared.output import moment, note, print_json, print_table, say, visible_name
from ringfence.cli.shared.output_files import is_stdout, output_file
from ringfence.cli.shared.tables import ending, ids, prose
from ringfence.client.errors import InvalidCallError, RefusedError
from ringfence.messages.registry import UserState
from ringfence.model.identity.spiffe_ids import spiffe_id

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import Administrator
    from ringfence.client.admin.command_client import Accepted
    from ringfence.client.admin.key_compromise import KeyCompromise, RestingKey, RestingRight
    from ringfence.client.admin.user_keys import KeyOfUser, KeyPackage
    from ringfence.model.records.directory import Directory

UserArgument = Annotated[str, typer.Argument(metavar="USER", callback=check_name, help="The user's id.")]
PackageOption = Annotated[
    Path | None,
    typer.Option(
        "--package",
        metavar="FILE",
        help="What the sign page, or `ringfence key prove`, gave out for the new key; - reads stdin.",
    ),
]
KidArgument = Annotated[
    str,
    typer.Argument(metavar="KID", help="The key's thumbprint, or how it begins: four characters or more."),
]
_SHORTEST_KID = 4
_KID_WITH_HYPHEN = re.compile(r"-(?!-)[\w-]{3,42}|--[\w-]{41}", re.ASCII)
"""A thumbprint (base64url of SHA-256, 43 characters; RFC 7638), or its beginning, that looks like an option."""


class EndKeyCommand(TyperCommand):
    """A command whose last argument is a thumbprint. One thumbprint in 64 begins with a hyphen, and is no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command. A thumbprint that begins with a hyphen may stand anywhere among them."""
        with_value = {word for one in self.params if not getattr(one, "is_flag", True) for word in one.opts}
        before = ["", *args]
        kids = [
            at
            for at, word in enumerate(args)
            if _KID_WITH_HYPHEN.fullmatch(word) and before[at] not in with_value
        ]
        if len(kids) == 1 and "--" not in args:
            kid = args[kids[0]]
            args = [*args[: kids[0]], *args[kids[0] + 1 :], "--", kid]
        return super().parse_args(ctx, args)


def invite(
    user: UserArgument,
    valid: Annotated[
        str, typer.Option("--valid", metavar="DURATION", help="How long it may be used: 24h at most.")
    ] = "24h",
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Invite a person to make a key of their own, and print the link to the sign page.

    As an operator, or with a key file of one's own. The invitation adds nothing: what the person sends back is added by
    `ringfence user add-key`.
    """

    async def work() -> tuple[str, str | None]:
        from ringfence.client.admin import user_keys

        async with connect.administrator(identity(me)) as administrator:
            directory = await administrator.directory()
            _require_user(directory, user)
            invitation = user_keys.invite(administrator.connection, user, duration_s(valid))
            return invitation, _sign_page_link(administrator, directory, invitation, user)

    invitation, link = run(work())
    if wants_json(as_json):
        print_json({"user": user, "invitation": invitation, "link": link})
        return
    if link is None:
        note(
            "the trust bundle names no sign page: only key files can answer (ringfence key prove)", "warning"
        )
        say(invitation)
        return
    say(link)


def _sign_page_link(
    administrator: Administrator, directory: Directory, invitation: str, user: str
) -> str | None:
    """Return the link that opens the sign page with an invitation; None if the trust bundle names no such page."""
    from ringfence.client.passkeys import questions

    connection = administrator.connection
    try:
        origin = questions.sign_origin(connection.trust, connection.clock.now_ms() / 1000)
    except InvalidCallError:
        return None
    question = questions.invitation_question(invitation, user, administrator.id, directory, connection.trust)
    return questions.question_link(origin, question)


def add_key(
    user: UserArgument,
    package: PackageOption = None,
    new_key: NewKeyOption = None,
    endorsement: Annotated[
        Path | None,
        typer.Option(
            "--endorsement",
            metavar="FILE",
            help="A second operator's co-signature (ringfence user endorse-key): the key counts at once.",
        ),
    ] = None,
    attestation_root: Annotated[
        list[Path] | None,
        typer.Option(
            "--attestation-root",
            metavar="FILE",
            help="PEM certificates of makers of authenticators: verify the passkey's attestation against these, and "
            "add it as attested. Repeatable.",
        ),
    ] = None,
    key_days: KeyDaysOption = 365,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a key to a person, and keep the others. As an operator, or with a key file of one's own; never by a passkey.

    A key that somebody else adds counts for approvals after 24 hours, or at once with --endorsement. The first key of a
    person counts at once.
    """
    from ringfence.client.admin import user_keys

    if (package is None) == (new_key is None):
        raise typer.BadParameter("give --package or --new-key")
    cosigned = _text(endorsement) if endorsement else None
    found: KeyPackage | None = _package(package, user) if package else None
    attested = bool(attestation_root)
    if attested:
        _verify_attestation(found, attestation_root or [])
    if found is not None:
        kind = "passkey" if found.passkey else "key file"
        confirm(f"Add the {kind} with the thumbprint {found.kid} to {user}?", yes)

    async def work() -> tuple[Accepted, KeyOfUser | None]:
        async with connect.administrator(identity(me)) as administrator:
            directory = await administrator.directory()
            _require_user(directory, user)
            connection = administrator.connection
            if new_key is None:
                assert found is not None
                given = found
            else:
                given = _made_here(administrator, user, new_key)
            end_s = connection.clock.now_ms() // 1000 + key_days * 86_400
            accepted = await administrator.add_user_key(
                user,
                given.record(end_s, attested=attested),
                invitation=given.invitation,
                possession=given.possession,
                endorsement=cosigned,
            )
            directory = await connection.current_directory()
            entry = directory.user(user)
            keys = user_keys.keys_of(directory, entry.state) if entry else []
            return accepted, next((one for one in keys if one.key.kid == given.kid), None)

    with keep_key_if_accepted(new_key):
        accepted, added = run(work())
    counts_ms = added.origin.counts_from_ms if added and added.origin else None
    more = {"key_file": str(new_key)} if new_key else {}
    kid = added.key.kid if added else ""
    document = {"kid": kid, "counts_from_ms": counts_ms}
    sentence = f"key {kid} of {user} added"
    if counts_ms is not None and counts_ms > accepted.at_ms + 1000:
        sentence += f"; it counts for approvals from {moment(counts_ms / 1000)}"
    print_accepted(accepted, sentence, wants_json(as_json), document, **more)


def _made_here(administrator: Administrator, user: str, file: Path) -> KeyPackage:
    """Make a key file, invite its owner, and answer the invitation, all at once."""
    from ringfence.client.admin import user_keys
    from ringfence.kernel.crypto.keys import SigningKey

    check_folder(file)
    key = SigningKey.generate(spiffe_id(settings().trust_domain, "user", user))
    key.save(file)
    invitation = user_keys.invite(administrator.connection, user)
    return user_keys.prove(key, invitation, administrator.connection.clock.now_ms() // 1000)


def _verify_attestation(package: KeyPackage | None, roots: list[Path]) -> None:
    from ringfence.client.admin.user_keys import verify_attestation

    if package is None or not package.passkey:
        raise InvalidCallError("only a passkey has an attestation; leave out --attestation-root")
    verify_attestation(package, [_bytes(root) for root in roots])


def endorse_key(
    user: UserArgument,
    package: PackageOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", callback=output_file, help="Write it to this new file."
        ),
    ] = None,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Co-sign a new key as the second operator, so that it counts at once. Sends nothing, and needs no network.

    Be sure that the person themself gave you the thumbprint. Hand the result to the operator who adds the key.
    """
    from ringfence.client.admin import user_keys
    from ringfence.client.connection import Connection

    if package is None:
        raise typer.BadParameter("give --package")
    found = _package(package, user)
    kind = "passkey" if found.passkey else "key file"
    confirm(f"Co-sign that the {kind} with the thumbprint {found.kid} is {user}'s?", yes)
    signed = user_keys.endorse(Connection(identity(me)), found)
    output = None if output is None or is_stdout(output) else output
    if output is not None:
        check_folder(output)
        with output.open("x") as file:
            file.write(signed + "\n")
    if wants_json(as_json):
        print_json({"user": user, "kid": found.kid, "endorsement": signed})
    else:
        say(f"written to {output}" if output else signed)


def keys(
    user: Annotated[
        str | None,
        typer.Argument(metavar="USER", callback=check_name, help="The user's id; yourself by default."),
    ] = None,
    wide: WideOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a person's keys: who vouched for each, and since when it counts for approvals."""
    from ringfence.client.admin import user_keys

    async def work() -> tuple[str, list[KeyOfUser]]:
        async with connect.administrator(signer(me, passkey, as_user)) as administrator:
            directory = await administrator.directory()
            whose = user or administrator.id
            return whose, user_keys.keys_of(directory, _require_user(directory, whose))

    whose, found = run(work())
    if wants_json(as_json):
        print_json({"user": whose, "keys": [_document(one) for one in found]})
        return
    now_s = time.time()
    print_table(
        [ids("key"), "kind", prose("vouched for by"), "counts", "attested", ending("ends")],
        (
            (
                one.key.kid,
                "passkey" if one.key.use else "file",
                _vouched_text(one),
                _counts_text(one, now_s),
                "yes" if one.key.attested else "no",
                _end_text(one, now_s),
            )
            for one in found
        ),
        empty=f"{whose} has no key; invite them with: ringfence user invite {whose}",
        wide=wide,
    )


def end_key(
    user: UserArgument,
    kid: KidArgument,
    reason: ReasonOption,
    compromised: Annotated[
        bool,
        typer.Option(
            "--compromised",
            help="It may be in other hands: it never comes back, and the keys that it gave, agents' too, end as well.",
        ),
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME",
            help="With --compromised: since when it may have been in other hands. What it gave before stays.",
        ),
    ] = None,
    yes: YesOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a key of a person: it signs nothing new. What it signed stays valid. As that person, or as an operator.

    With --compromised, first lists all that it gave: keys of people and agents, which end as well, and rights, each
    with the command that undoes it. Repeat the command to end what was given meanwhile.
    """
    if since and not compromised:
        raise typer.BadParameter("only of a compromised key: add --compromised", param_hint="--since")
    since_ms = None if since is None else moment_ms(since)
    who = signer(me, passkey, as_user)

    async def work() -> tuple[Accepted, KeyCompromise, list[tuple[RestingKey, bool]], list[RestingRight]]:
        from ringfence.client.admin.key_compromise import KeyCompromise

        async with connect.administrator(who) as administrator:
            directory = await administrator.directory()
            clock = administrator.connection.clock
            if since_ms is not None and since_ms > clock.now_ms():
                raise InvalidCallError(f"--since {since} is still to come; say since when it was")
            state = _require_user(directory, user)
            found = KeyCompromise(directory, user, _whole_kid(state, kid), since_ms or 0)
            resting = found.keys() if compromised else []
            rights = found.rights(clock.now_ms() / 1000) if compromised else []
            _print_resting(resting, rights)
            if since is None and (resting or rights):
                first_ms = min([one.given_ms for one in resting] + [one.given_ms for one in rights])
                first = moment(first_ms / 1000).replace(" ", "T")
                raise InvalidCallError(
                    f"the key gave {len(resting)} keys and {len(rights)} rights; say since when it may have been in "
                    f"other hands, with --since TIME; --since {first} is all of it"
                )
            ended = found.own_keys() if compromised else {found.kid}
            confirm(_question(state, ended, resting), yes or signs_on_page(who))
            origin = directory.key_history(user).origins.get(found.kid)
            always_ms = origin.added_ms if origin else 0  # where it gave nothing, no other time is asked for
            accepted = await administrator.end_user_key(
                user,
                found.kid,
                reason=reason,
                compromised=compromised,
                since_ms=(always_ms if since_ms is None else since_ms) if compromised else None,
            )
            if not compromised:
                return accepted, found, [], []
            others = await _end_resting(administrator, found, reason)
            return accepted, found, others, [*rights, *_given_meanwhile(found, rights, clock.now_ms() / 1000)]

    accepted, found, others, rights = run(work())
    document: dict[str, Any] = {
        "kid": found.kid,
        "others": [
            {"kind": one.kind, "id": one.id, "kid": one.kid, "ended": is_ended} for one, is_ended in others
        ],
        "rights": [
            {"kind": one.kind, "id": one.id, "what": one.what, "at_ms": one.given_ms, "undo": one.undo}
            for one in rights
        ],
    }
    print_accepted(accepted, f"key {found.kid} of {user} ended", wants_json(as_json), document)
    for one, is_ended in others:
        if is_ended:
            note(f"key {one.kid} of {one.kind} {one.id}, which rests on it, ended as well")
        else:
            note(
                f"key {one.kid} of {one.kind} {one.id}, which rests on it, has not ended; another operator ends it, "
                "with this same command and a key file",
                "warning",
            )


_MOST_PASSES = 8
"""How often `end-key` looks for keys that were given while it ended others."""


async def _end_resting(
    administrator: Administrator, found: KeyCompromise, reason: str
) -> list[tuple[RestingKey, bool]]:
    """End the keys that rest on a compromised key, as far as the signer may; return all, and whether each ended.

    A refused end leaves those of other keys.
    """
    tried: list[RestingKey] = []
    for _ in range(_MOST_PASSES):
        await administrator.connection.current_directory()
        left = found.keys()
        new = [one for one in left if one not in tried and _may_end(administrator, found, one)]
        if not new:
            break
        for keys in _ended_at_once(new):
            try:
                await _end_keys(administrator, keys, found.since_ms, reason)
            except RefusedError as error:
                note(f"keys of {keys[0].kind} {keys[0].id}: {error}", "warning")
        tried += new
    await administrator.connection.current_directory()
    left = found.keys()
    return [*((one, True) for one in tried if one not in left), *((one, False) for one in left)]


def _given_meanwhile(found: KeyCompromise, known: list[RestingRight], now_s: float) -> list[RestingRight]:
    """Print and return the rights that were given since somebody was asked, and before the keys ended."""
    given = [one for one in found.rights(now_s) if one not in known]
    _print_resting([], given)
    return given


def _ended_at_once(keys: list[RestingKey]) -> Iterator[list[RestingKey]]:
    """Yield the keys that one command ends: one of a person, or several of an agent, whose record has little room."""
    from ringfence.client.admin.key_compromise import MAX_KEYS_AT_ONCE

    of_agents: dict[str, list[RestingKey]] = {}
    for key in keys:
        if key.kind == "user":
            yield [key]
        else:
            of_agents.setdefault(key.id, []).append(key)
    for same in of_agents.values():
        for first in range(0, len(same), MAX_KEYS_AT_ONCE):
            yield same[first : first + MAX_KEYS_AT_ONCE]


async def _end_keys(administrator: Administrator, keys: list[RestingKey], since_ms: int, reason: str) -> None:
    kind, id, kids = keys[0].kind, keys[0].id, [one.kid for one in keys]
    if kind == "user":
        await administrator.end_user_key(id, kids[0], reason=reason, compromised=True, since_ms=since_ms)
    else:
        await administrator.rotate_key(id, None, replaces=kids, compromised=True, reason=reason)


def _may_end(administrator: Administrator, found: KeyCompromise, key: RestingKey) -> bool:
    """Return whether the signer may end a key that rests on the compromised one; not the key that they sign with."""
    connection = administrator.connection
    own_kid = connection.key.kid if connection.passkey_user is None else None
    if own_kid == key.kid or own_kid in found.own_keys():
        return False
    operator = administrator.is_root or _is_operator(found.directory, administrator.id)
    if key.kind == "user":
        return operator or administrator.id == key.id
    return own_kid is not None and (operator or administrator.id == key.sponsor)


def _print_resting(keys: list[RestingKey], rights: list[RestingRight]) -> None:
    for key in keys:
        note(f"rests on it: key {key.kid} of {key.kind} {key.id}, given {moment(key.given_ms / 1000)}")
    for right in rights:
        note(
            f"rests on it: {right.kind} {right.id}: {right.what}, {moment(right.given_ms / 1000)}; stays, unless "
            f"undone with: {right.undo}",
            "warning",
        )


def _question(state: UserState, ended: Collection[str], others: list[RestingKey]) -> str:
    now_s = time.time()
    left = [key.kid for key in state.keys if key.not_after > now_s and key.kid not in ended]
    question = f"End {', '.join(sorted(ended))} of {state.user_id}"
    if others:
        question += f", and the {len(others)} keys of others that rest on it"
    return f"{question}? {'' if left else f'{state.user_id} has no key then. '}".strip()


def _whole_kid(state: UserState, beginning: str) -> str:
    """Return the thumbprint that begins so, among the user's keys. Raises InvalidCallError."""
    found = [key.kid for key in state.keys if key.kid.startswith(beginning)]
    if beginning in found:
        return beginning
    if len(found) != 1 or len(beginning) < _SHORTEST_KID:
        reason = "no key" if not found else "several keys" if len(found) > 1 else "too short a beginning"
        raise InvalidCallError(f"{visible_name(beginning)} is {reason} of {state.user_id}").with_remedy(
            f"ringfence user keys {state.user_id}"
        )
    return found[0]


def _is_operator(directory: Directory, user_id: str) -> bool:
    entry = directory.user(user_id)
    return entry is not None and "operator" in entry.state.roles


def _require_user(directory: Directory, user: str) -> UserState:
    from ringfence.client.admin.unknown_subjects import unknown_subject

    entry = directory.user(user)
    if entry is None:
        raise unknown_subject(directory, "user", user)
    return entry.state


def _package(file: Path, user: str) -> KeyPackage:
    from ringfence.client.admin.user_keys import read_package

    found = read_package(sys.stdin.read() if str(file) == "-" else _text(file))
    if found.user_id != user:
        raise InvalidCallError(f"the package is {found.user_id}'s, and not {user}'s")
    return found


def _text(file: Path) -> str:
    return _bytes(file).decode(errors="replace").strip()


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidCallError(f"cannot read {file}: {error.strerror}") from None


def _vouched_text(one: KeyOfUser) -> str:
    origin = one.origin
    if origin is None:
        return "unknown"
    people = sorted(origin.vouchers) or [origin.by or "the root"]
    return ", ".join(people)


def _counts_text(one: KeyOfUser, now_s: float) -> str:
    if one.origin is None or one.key.not_after <= now_s:
        return "no"
    from_s = max(one.origin.counts_from_ms / 1000, one.key.not_before)
    return "yes" if from_s <= now_s else f"{moment(from_s)[:16]}Z"


def _end_text(one: KeyOfUser, now_s: float) -> str:
    if one.compromised:
        return "compromised"
    return (
        f"ended {moment(one.key.not_after)[:10]}"
        if one.key.not_after <= now_s
        else moment(one.key.not_after)[:10]
    )


def _document(one: KeyOfUser) -> dict[str, Any]:
    origin = one.origin
    return {
        **one.key.model_dump(mode="json", exclude_none=True),
        "compromised": one.compromised,
        "added_by": origin.by if origin else None,
        "added_with": origin.by_kid if origin else None,
        "added_at_ms": origin.added_ms if origin else None,
        "endorsed_by": origin.endorsed_by if origin else None,
        "vouchers": sorted(origin.vouchers) if origin else [],
        "counts_from_ms": origin.counts_from_ms if origin else None,
    }


def add_to(app: typer.Typer) -> None:
    """Add the commands to the group of users."""
    app.command()(invite)
    app.command(name="add-key")(add_key)
    app.command(name="endorse-key")(endorse_key)
    app.command()(keys)
    app.command(name="end-key", cls=EndKeyCommand)(end_key)
