"""`ringfence user invite`, `add-key`, `endorse-key`, `keys` and `end-key`: the keys of people."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection, Sequence
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
from ringfence.cli.shared.output import (
    is_stdout,
    moment,
    note,
    output_file,
    print_json,
    print_table,
    say,
    visible_name,
)
from ringfence.cli.shared.tables import ending, ids, prose
from ringfence.client.errors import InvalidCallError
from ringfence.messages.registry import MAX_HELD, Hold, UserState
from ringfence.model.identity.spiffe_ids import spiffe_id

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import Administrator
    from ringfence.client.admin.command_client import Accepted
    from ringfence.client.admin.user_keys import KeyOfUser, KeyPackage
    from ringfence.model.records.directory import Directory
    from ringfence.model.records.key_compromise import Resting

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

    As an operator, or with a key file of one's own; as the root, for `ringfence init --second-operator`. The invitation
    adds nothing: what the person sends back is added by `ringfence user add-key`.
    """

    async def work() -> tuple[str, str | None]:
        from ringfence.client.admin import user_keys

        async with connect.administrator(identity(me)) as administrator:
            directory = await administrator.directory()
            invitation = user_keys.invite(administrator.connection, user, duration_s(valid))
            if administrator.is_root:  # of an operator who is no user yet: ringfence init --second-operator
                return invitation, None
            _require_user(directory, user)
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
            help="A second operator's co-signature (ringfence user endorse-key): the key is valid at once.",
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

    async def work() -> tuple[str, list[KeyOfUser], tuple[Hold, ...]]:
        async with connect.administrator(signer(me, passkey, as_user)) as administrator:
            directory = await administrator.directory()
            whose = user or administrator.id
            state = _require_user(directory, whose)
            return whose, user_keys.keys_of(directory, state), state.holds

    whose, found, reports = run(work())
    if wants_json(as_json):
        documents = [one.model_dump(mode="json") for one in reports]
        print_json({"user": whose, "keys": [_document(one) for one in found], "reports": documents})
        return
    for one in reports:
        rests = f"; held here: {', '.join(one.parts)}" if one.parts else ""
        note(
            f"key {one.kid} of {one.user_id}: reported by {one.by or 'the root'}, {one.status}{rests}",
            "warning",
        )
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
            help="It may be in other hands: it never comes back, and what rests on it is held.",
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

    With --compromised, first lists all that rests on it, in all records. An operator's command holds that: its leases
    end, and nothing is issued until somebody entitled sets it anew, or a second operator lifts the report (`ringfence
    user confirm-compromise`). More than 30 days back, or by a passkey about somebody else, nothing happens until a
    second operator gives the same command.
    """
    if since and not compromised:
        raise typer.BadParameter("only of a compromised key: add --compromised", param_hint="--since")
    since_ms = None if since is None else moment_ms(since)
    who = signer(me, passkey, as_user)

    async def work() -> tuple[Accepted, str, list[Resting]]:
        from ringfence.model.records.key_compromise import KeyCompromise

        async with connect.administrator(who) as administrator:
            directory = await administrator.directory()
            now_ms = administrator.connection.clock.now_ms()
            if since_ms is not None and since_ms > now_ms:
                raise InvalidCallError(f"--since {since} is still to come; say since when it was")
            state = _require_user(directory, user)
            whole = _whole_kid(state, kid)
            if not compromised:
                confirm(_question(state, {whole}, 0), yes or signs_on_page(who))
                return await administrator.end_user_key(user, whole, reason=reason), whole, []
            found = KeyCompromise(directory, user, whole, since_ms or 0)
            resting = found.resting(now_ms / 1000)
            for one in resting:
                note(f"rests on it: {_resting_text(one)}", "warning")
            if since_ms is None and resting:
                first = moment(resting[0].given_ms / 1000).replace(" ", "T")
                raise InvalidCallError(
                    f"{len(resting)} records rest on the key; say since when it may have been in other hands, with "
                    f"--since TIME; --since {first} is all of it"
                )
            operator = administrator.is_root or _is_operator(directory, administrator.id)
            held = resting if operator else []
            confirm(_question(state, found.own_keys, len(held)), yes or signs_on_page(who))
            # Where nothing rests on it, no other time is asked for; further back it takes a second operator.
            at_ms = now_ms - _DEFAULT_SINCE_MS if since_ms is None else since_ms
            accepted = None
            for part in _lists(held) or [[]]:
                accepted = await administrator.end_user_key(
                    user,
                    whole,
                    reason=reason,
                    compromised=True,
                    since_ms=at_ms,
                    holds=[one.held for one in part],
                )
            assert accepted is not None
            return accepted, whole, resting

    accepted, whole, resting = run(work())
    document: dict[str, Any] = {
        "kid": whole,
        "holds": [{**one.held.model_dump(mode="json"), "given_ms": one.given_ms} for one in resting],
    }
    # A report that waits for a second operator is accepted too, and ends nothing.
    done = "reported as compromised" if compromised else "ended"
    print_accepted(accepted, f"key {whole} of {user} {done}", wants_json(as_json), document)
    if compromised:
        note(f"see what is in effect with: ringfence user keys {user}")


_DEFAULT_SINCE_MS = 29 * 24 * 3600 * 1000
_LIST_BYTES = 4096
"""How long the list of one command may be, in JSON: each record that it holds embeds the command."""


def _lists(resting: Sequence[Resting]) -> list[list[Resting]]:
    """Return the lists of the commands that hold all of these."""
    lists: list[list[Resting]] = []
    size = _LIST_BYTES
    for one in resting:
        length = len(one.held.model_dump_json())
        if size + length > _LIST_BYTES or len(lists[-1]) == MAX_HELD:
            lists.append([])
            size = 0
        lists[-1].append(one)
        size += length
    return lists


def _resting_text(one: Resting) -> str:
    held = one.held
    return (
        f"{held.kind} {held.id} (revision {held.revision}): {', '.join(held.parts)}, given "
        f"{moment(one.given_ms / 1000)}"
    )


def confirm_compromise(
    user: UserArgument,
    kid: KidArgument,
    reason: ReasonOption,
    lift: Annotated[
        bool, typer.Option("--lift", help="Lift the reports: the key was not in other hands. It stays ended.")
    ] = False,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Confirm that a key was compromised, as a second operator, or lift the reports that say so.

    You may not be the operator who reported it, nor the key's user, and your key and roles must rest on neither. What
    is held stays refused until somebody entitled sets it anew; --lift frees it. Nothing else changes.
    """

    async def work() -> tuple[Accepted, str]:
        async with connect.administrator(identity(me)) as administrator:
            directory = await administrator.directory()
            state = _require_user(directory, user)
            whole = _whole_kid(state, kid)
            reports = [
                one
                for one in state.holds
                if one.kid == whole and one.status != "proposed" and (lift or one.status == "held")
            ]
            if not reports:
                raise InvalidCallError(f"no report of key {whole} waits for a review").with_remedy(
                    f"ringfence user keys {user}"
                )
            ids = {one.report for one in reports}
            for kind in ("user", "agent", "target", "task"):
                for entry in directory.entries(kind):
                    parts = [part for one in entry.state.holds if one.report in ids for part in one.parts]
                    if parts:
                        note(f"held: {entry.record.sub}: {', '.join(parts)}", "warning")
            by = ", ".join(sorted({one.by or "the root" for one in reports}))
            what = "Lift the reports" if lift else "Confirm"
            confirm(f"{what} that key {whole} of {user} was compromised, as {by} reported?", yes)
            accepted = None
            for one in reports:
                accepted = await administrator.review_compromise(
                    user, one, "lift" if lift else "void", reason=reason
                )
            assert accepted is not None
            return accepted, whole

    accepted, whole = run(work())
    done = "lifted" if lift else "confirmed"
    print_accepted(accepted, f"reports of key {whole} of {user} {done}", wants_json(as_json), {"kid": whole})


def _question(state: UserState, ended: Collection[str], held: int) -> str:
    now_s = time.time()
    left = [key.kid for key in state.keys if key.not_after > now_s and key.kid not in ended]
    question = f"End {', '.join(sorted(ended))} of {state.user_id}"
    if held:
        question += f", and hold {held} records that rest on it"
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
    app.command()(invite)
    app.command(name="add-key")(add_key)
    app.command(name="endorse-key")(endorse_key)
    app.command()(keys)
    app.command(name="end-key", cls=EndKeyCommand)(end_key)
    app.command(name="confirm-compromise", cls=EndKeyCommand)(confirm_compromise)
