"""Options that many commands share, and their parsers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from ringfence.cli.shared import context
from ringfence.cli.shared.arguments import check_name
from ringfence.cli.shared.output import kept_file
from ringfence.client.errors import InvalidCallError, NotAnsweredError, ProposedError
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.text import shown
from ringfence.kernel.crypto.claims import MAX_LIFE_S

if TYPE_CHECKING:
    from ringfence.client.passkeys.questions import PasskeyUser
    from ringfence.client.settings import ClientSettings
    from ringfence.messages.base import KeyRecord, PublicJwk

C = TypeVar("C")
T = TypeVar("T")

COMMON = "Common options"
"""The heading of the options that every command has."""

IdentityOption = Annotated[
    Path | None,
    typer.Option(
        "--identity", metavar="FILE", help="The key file of who is calling.", rich_help_panel=COMMON
    ),
]
PasskeyOption = Annotated[
    bool,
    typer.Option(
        "--passkey",
        help="Sign with your passkey, on the sign page in a browser; no key file is needed.",
        rich_help_panel=COMMON,
    ),
]
AsOption = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="USER",
        callback=check_name,
        help="With --passkey: who you are. [RINGFENCE_USER]",
        rich_help_panel=COMMON,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=COMMON)]
WideOption = Annotated[
    bool,
    typer.Option(
        "--wide",
        help="Print a table with whole ids and all columns, however wide. So it is where stdout is no terminal.",
    ),
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="PERMISSION",
        help="TARGET:VERBS:RESOURCES, several with commas between; a JSON object; or @FILE with a JSON list. "
        "Repeatable.",
    ),
]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=NUMBER",
        help="The most that a task may use of language models: tokens=200000, requests=500. Repeatable.",
    ),
]
AddOption = Annotated[
    list[str] | None,
    typer.Option(
        "--add", metavar="PERMISSION", help="Allow this as well, and keep what is allowed. Repeatable."
    ),
]
RemoveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--remove",
        metavar="PERMISSION",
        help="Take this away, and keep the rest: of each verb that is named, every resource within a named one. "
        "Repeatable.",
    ),
]
AnywayOption = Annotated[
    bool,
    typer.Option("--anyway", help="Also where it names a target or verb that is not there (yet)."),
]
AttestOption = Annotated[
    str | None,
    typer.Option(
        "--attest",
        metavar="SOURCE",
        help="Enrol a fresh key with the platform's identity token: file:PATH, github or gcp. [RINGFENCE_ATTEST]",
        rich_help_panel=COMMON,
    ),
]
AgentOption = Annotated[
    str | None,
    typer.Option(
        "--agent",
        metavar="AGENT",
        callback=check_name,
        help="With --attest: the agent that this is an instance of. [RINGFENCE_AGENT]",
        rich_help_panel=COMMON,
    ),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it is kept in the trail.")]
SinceOption = Annotated[
    str,
    typer.Option(
        "--since", metavar="WHEN", help="From when: a duration ago, or a moment. Audit keeps 365 days."
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
PublicKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--public-key",
        metavar="FILE",
        help="A public key: a JWK, or the output of: ringfence key show --json.",
    ),
]
NewKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--new-key",
        metavar="FILE",
        callback=kept_file,
        help="Make a key, and write its private half to this new file.",
    ),
]
KeyDaysOption = Annotated[
    int, typer.Option("--key-days", metavar="DAYS", min=1, max=3650, help="How many days the key is valid.")
]
AgentKeyDaysOption = Annotated[
    int,
    typer.Option(
        "--key-days",
        metavar="DAYS",
        min=1,
        max=90,
        help="How many days the key is valid; the agent renews it.",
    ),
]

ConsentValidOption = Annotated[
    str,
    typer.Option(
        "--valid",
        metavar="DURATION",
        help="Until when it may be used: 24h at most, with --passkey 10m at most.",
    ),
]

_PASSKEY_CONSENT_S = 600
"""`MAX_AGE_S` of `kernel.crypto.webauthn`, which is not imported only to parse an option."""
_MAX_CREDENTIAL_S = 86_400
"""The most that a field of type `TtlSeconds` holds."""
_SIZE = re.compile(r"(\d{1,15})([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DURATION = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)


def settings() -> ClientSettings:
    from ringfence.client.settings import ClientSettings
    from ringfence.kernel.base.settings import load

    return load(ClientSettings)


def identity(option: Path | None) -> Path | None:
    """Return the key file of the caller; None leaves it to the settings."""
    return context.identity(option)


def signer(option: Path | None, passkey: bool, user: str | None) -> Path | PasskeyUser | None:
    """Return who signs: the key file of the caller (as `identity`), or with `--passkey` a person at the sign page.

    Raises typer.BadParameter where it is not said who, or both are named.
    """
    if not passkey:
        if user is not None:
            raise typer.BadParameter("it is for --passkey; a key file says who you are", param_hint="--as")
        return context.identity(option)
    if option is not None:
        raise typer.BadParameter("name a key file or a passkey, and not both", param_hint="--passkey")
    from ringfence.client.passkeys.questions import PasskeyUser

    user = user or settings().user
    if user is None:
        raise typer.BadParameter("say who you are with --as USER, or RINGFENCE_USER", param_hint="--passkey")
    return PasskeyUser(user, _show_link)


def signs_on_page(who: Path | PasskeyUser | None) -> bool:
    """Return whether this person signs on the sign page, where they see what it is and answer."""
    from ringfence.client.passkeys.questions import PasskeyUser

    return isinstance(who, PasskeyUser)


def _show_link(link: str) -> None:
    from ringfence.cli.shared.output import note

    note("Open this page in your browser, look at it, and sign there:", "heading")
    note(link)
    if sys.stderr.isatty() and (
        sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    ):
        import webbrowser

        webbrowser.open(link)


def wants_json(option: bool) -> bool:
    return context.wants_json(option)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine. Ctrl-C cancels it, and everything is closed before the program ends."""
    # For a broker that does not answer, our own error is one line with a remedy.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    return asyncio.run(work)


def call(client: AbstractAsyncContextManager[C], method: Callable[[C], Awaitable[T]]) -> T:
    """Run one call of a client, which is connected for it. Raises as both do."""

    async def work() -> T:
        async with client as connected:
            return await method(connected)

    return run(work())


def not_ignored(*numbers: signal.Signals) -> tuple[signal.Signals, ...]:
    """Return those signals that whoever started this program has not made it ignore, as `nohup` does with SIGHUP.

    None outside the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return ()
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


def duration_s(text: str) -> int:
    """Parse `90s`, `15m`, `1h30m`, `2d` into seconds. Raises typer.BadParameter."""
    if text.isascii() and text.isdigit() and 0 < len(text) < 10:
        # Five of what? A guess that is wrong makes a credential live sixty times as long, or end at once.
        raise typer.BadParameter(
            f"{text!r} has no unit; write {text}m for minutes, or {text}s, {text}h, {text}d"
        )
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise typer.BadParameter(f"{text!r} is no duration; write for example 90s, 15m, 1h30m or 2d")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 1:
        raise typer.BadParameter(f"{text!r} is no time at all; write for example 15m")
    return total


def size_bytes(text: str) -> int:
    """Parse `512M` or `2G` into bytes, in powers of 1024. Raises typer.BadParameter."""
    match = _SIZE.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no size; write for example 512M or 2G", param_hint="--memory")
    return int(match[1]) * _UNITS[match[2].upper()]


def credential_life_s(text: str) -> int:
    """Parse how long a credential lives into seconds. Raises typer.BadParameter where none may live that long."""
    life_s = duration_s(text)
    if life_s > _MAX_CREDENTIAL_S:
        raise typer.BadParameter(f"{text!r} is longer than any credential may live: 24h")
    return life_s


def consent_life_s(text: str, who: Path | PasskeyUser | None) -> int:
    """Parse the validity of a consent by `who` into seconds. Messages signed by passkeys count for ten minutes at most.

    Raises typer.BadParameter if services accept none so long.
    """
    life_s = duration_s(text)
    if life_s > MAX_LIFE_S:
        raise typer.BadParameter(f"{text!r} is longer than a consent may be used: 24h", param_hint="--valid")
    return min(life_s, _PASSKEY_CONSENT_S) if signs_on_page(who) else life_s


def moment_s(text: str) -> int:
    """Parse a time with its time zone (ISO 8601) into seconds since 1970. Raises typer.BadParameter."""
    return moment_ms(text) // 1000


def moment_ms(text: str) -> int:
    """Parse a time with its time zone (ISO 8601) into milliseconds since 1970. Raises typer.BadParameter."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no moment; write for example 2030-01-31T18:00:00Z") from None
    if at.tzinfo is None:
        whole = text if len(text) > len("2030-01-31") else f"{text}T00:00:00"
        raise typer.BadParameter(f"{text!r} has no time zone; write for example {whole}Z for UTC")
    return int(at.timestamp() * 1000)


def confirm(question: str, yes: bool) -> None:
    """Ask for confirmation.

    Raises RingfenceError if the answer is no, WrongUseError if nobody is there to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise context.WrongUseError(f"{question} Nobody is there to answer: add --yes to do it")
    if not typer.confirm(shown(question), err=True):
        raise RingfenceError("nothing was done")


def read_public_key(path: Path) -> PublicJwk:
    """Read a public key from a file: a JWK, or a key file of Ringfence (whose private key is ignored).

    Raises KeyFileError.
    """
    from ringfence.kernel.crypto.keys import KeyFileError, public_key
    from ringfence.messages.base import PublicJwk

    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise KeyFileError(f"{path} is not JSON; a public key is a JWK (RFC 7517)") from None
    fields = data.get("jwk", data) if isinstance(data, dict) else {}
    try:
        jwk = PublicJwk.model_validate(
            {name: fields[name] for name in ("kty", "crv", "x", "y") if name in fields}
        )
        public_key(jwk)
    except (ValidationError, ValueError):
        raise KeyFileError(
            f"{path} holds no public key that signs: a JWK of EC P-256 or OKP Ed25519 (ringfence key show FILE)"
        ) from None
    return jwk


@contextmanager
def keep_key_if_accepted(key_file: Path | None) -> Iterator[None]:
    """Delete the key file that was made for a command if the command is refused, because it would block the next
    attempt.

    If nobody answered, or if the command waits for a second person, the file stays: the command may still be carried
    out.
    """
    try:
        yield
    except (NotAnsweredError, ProposedError):
        raise
    except (RingfenceError, typer.Abort):
        if key_file is not None:
            key_file.unlink(missing_ok=True)
        raise


def check_folder(file: Path) -> None:
    """Check that a new file's folder is there: a mistyped path would make folders that nobody looks for.

    Raises InvalidCallError.
    """
    if not file.parent.is_dir():
        raise InvalidCallError(
            f"there is no folder {file.parent} for {file.name}; make it first"
        ).with_remedy(f"mkdir -p {file.parent}")


def key_records(public: Path | None, new: Path | None, id: str, days: int) -> tuple[KeyRecord, ...]:
    """Return the key that `--public-key` names, or that `--new-key` makes for `id`; empty where neither is given.

    Raises KeyFileError; typer.BadParameter where both are given.
    """
    from ringfence.kernel.crypto.keys import SigningKey, thumbprint
    from ringfence.messages.base import KeyRecord

    if public and new:
        raise typer.BadParameter("give --public-key or --new-key, and not both")
    not_after = int(time.time()) + days * 86_400
    if new:
        check_folder(new)
        key = SigningKey.generate(id)
        key.save(new)
        return (key.record(not_after),)
    if public:
        jwk = read_public_key(public)
        return (KeyRecord(kid=thumbprint(jwk), jwk=jwk, not_after=not_after),)
    return ()


# The period of a query: `--since` and `--until`.


def span_ms(since: str, until: str | None, now_ms: int) -> tuple[int, int]:
    """Return start and end in milliseconds since 1970. The end is now by default. Raises typer.BadParameter."""
    since_ms, until_ms = when_ms(since, now_ms), when_ms(until, now_ms) if until else now_ms
    if since_ms >= until_ms:
        raise typer.BadParameter("--since must be before --until")
    return since_ms, until_ms


def when_ms(text: str, now_ms: int) -> int:
    """Parse a duration before now, or a time, into milliseconds since 1970. Raises typer.BadParameter."""
    try:
        return max(now_ms - duration_s(text) * 1000, 0)
    except typer.BadParameter:
        if text[:4].isdecimal() and "-" in text:
            return max(moment_s(text) * 1000, 0)
        raise
