"""The command list at the start of a push (gitprotocol-pack): read strictly, written anew, refused in its format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ringfence.messages.registry import GitOperation
from ringfence.model.git.pkt_lines import MAX_LINE_BYTES, GitRequestError, Special, packet, read_packet
from ringfence.model.scope.globs import ScopeError, parse_name

MAX_COMMAND_BYTES: Final = 256 * 1024
"""Of the command list. That is about 2,500 refs."""
PUSH_CAPABILITIES: Final = frozenset({
    "report-status", "report-status-v2", "side-band-64k", "ofs-delta", "delete-refs", "atomic", "quiet",
    "object-format", "agent", "session-id",
})  # fmt: skip
"""The capabilities that a push may use. Any other may add a section that is not read here, such as push options."""
_VALUED: Final = frozenset({"object-format", "agent", "session-id"})
_ID_CHARS: Final[Mapping[str, int]] = {"sha1": 40, "sha256": 64}
_PACK: Final = b"PACK"
_ID: Final = r"[0-9a-f]{40}(?:[0-9a-f]{24})?"
_COMMAND: Final = re.compile(rf"({_ID}) ({_ID}) (refs(?:/[^\x00-\x20\x7f~^:?*\[\\/]+){{2,}})")
_SHALLOW: Final = re.compile(rf"shallow ({_ID})")
_CAPABILITY: Final = re.compile(r"([a-z0-9-]+)(?:=([!-~]{1,256}))?")
_MAX_REASON_CHARS: Final = 900


@dataclass(frozen=True, slots=True)
class RefUpdate:
    """One command: set a ref from one object to another. An id of zeros stands for a ref that does not exist."""

    old: str
    new: str
    ref: str

    @property
    def deletes(self) -> bool:
        return not self.new.strip("0")

    @property
    def operation(self) -> GitOperation:
        """Whether the ref may be moved back (a force push) cannot be told without the objects."""
        if self.deletes:
            return "delete"
        kinds: Mapping[str, GitOperation] = {"heads": "push", "tags": "tag"}
        return kinds.get(self.ref.split("/")[1], "push-other")


@dataclass(frozen=True, slots=True)
class CommandList:
    """All commands of a push."""

    updates: tuple[RefUpdate, ...] = ()
    """None: a probe, by which a client finds out whether a long push would be accepted."""
    shallow: tuple[str, ...] = ()
    """The commits at which the history of the sender's repository is cut off."""
    capabilities: tuple[str, ...] = ()

    def encoded(self) -> bytes:
        """The command list for the server, up to its flush packet."""
        lines = [packet(f"shallow {one}".encode()) for one in self.shallow]
        for number, one in enumerate(self.updates):
            capabilities = f"\0{' '.join(self.capabilities)}" if number == 0 else ""
            lines.append(packet(f"{one.old} {one.new} {one.ref}{capabilities}".encode()))
        return b"".join(lines) + Special.FLUSH.value

    def rejection(self, reason: str, advice: str | None = None) -> bytes | None:
        """The answer to a refused push, in the form that the client asked for; None if it asked for none.

        Args:
            reason: a sentence, shown beside each ref.
            advice: a text that is shown before, if the client can show one.
        """
        if {"report-status", "report-status-v2"}.isdisjoint(self.capabilities):
            return None
        refused = [f"ng {one.ref} {_one_line(reason)}\n".encode() for one in self.updates]
        lines = [b"unpack ok\n", *refused]
        report = b"".join(map(packet, lines)) + Special.FLUSH.value
        if "side-band-64k" not in self.capabilities:
            return report
        bands = [packet(b"\x02" + _one_line(advice).encode() + b"\n")] if advice else []
        most = MAX_LINE_BYTES - 5
        bands += [packet(b"\x01" + report[at : at + most]) for at in range(0, len(report), most)]
        return b"".join(bands) + Special.FLUSH.value


class CommandReader:
    """Reads a command list while its bytes arrive."""

    __slots__ = ("_complete", "_lines", "end")

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._complete = False
        self.end = 0
        """The offset behind the packets that were read."""

    def enough(self, read: bytes | bytearray) -> bool:
        """Whether the list is complete, and the signature of a pack after it. `read`: all bytes from the start.

        Raises GitRequestError.
        """
        while not self._complete:
            found = read_packet(read, self.end)
            if (len(read) if found is None else found[1]) > MAX_COMMAND_BYTES:
                raise GitRequestError(
                    f"the commands of a push may have {MAX_COMMAND_BYTES} bytes: push fewer refs at once"
                )
            if found is None:
                return False
            one, self.end = found
            if isinstance(one, bytes):
                self._lines.append(one)
            elif one is Special.DELIM:
                raise GitRequestError("the commands of a push have no delimiter packet")
            else:
                self._complete = True
        return len(read) >= self.end + len(_PACK)

    def command_list(self, read: bytes | bytearray, *, ended: bool) -> CommandList:
        """The command list. `ended`: whether `read` is the whole body. Raises GitRequestError."""
        if not self._complete:
            raise GitRequestError("the commands of a push are cut off: they end with a flush packet")
        found = _command_list(self._lines)
        if any(not one.deletes for one in found.updates):
            if read[self.end : self.end + len(_PACK)] != _PACK:
                raise GitRequestError("a pack follows the commands of a push, and nothing else")
        elif not ended or len(read) > self.end:
            raise GitRequestError(
                "nothing follows the commands of a push that only deletes refs, or of a probe"
            )
        return found


def _command_list(packets: list[bytes]) -> CommandList:
    lines = [_text(one) for one in packets]
    shallow: list[str] = []
    while lines and (match := _SHALLOW.fullmatch(lines[0])) is not None:
        shallow.append(match[1])
        del lines[0]
    if not lines:
        if shallow:
            raise GitRequestError("a push without commands says nothing of a shallow repository")
        return CommandList()
    lines[0], nul, text = lines[0].partition("\0")
    capabilities = _capabilities(text) if nul else ()
    updates = tuple(map(_update, lines))
    if len({one.ref for one in updates}) < len(updates):
        raise GitRequestError("a push names each ref once")
    format = next((one.partition("=")[2] for one in capabilities if one.startswith("object-format=")), "sha1")
    ids = [*shallow, *(id for one in updates for id in (one.old, one.new))]
    if any(len(id) != _ID_CHARS.get(format) for id in ids):
        raise GitRequestError("the ids of objects are those of one object-format, sha1 or sha256")
    return CommandList(updates, tuple(shallow), capabilities)


def _text(line: bytes) -> str:
    try:
        return line.removesuffix(b"\n").decode()
    except UnicodeDecodeError:
        raise GitRequestError("the commands of a push are UTF-8") from None


def _update(line: str) -> RefUpdate:
    match = _COMMAND.fullmatch(line)
    if match is None:
        raise GitRequestError("a command of a push is OLD NEW refs/..., with capabilities on the first alone")
    update = RefUpdate(*match.groups())
    try:
        parse_name(update.ref)
    except ScopeError as error:
        raise GitRequestError(f"no resource can name this ref: {error}") from None
    if update.deletes and not update.old.strip("0"):
        raise GitRequestError("a command of a push changes nothing")
    return update


def _capabilities(text: str) -> tuple[str, ...]:
    """Git writes one space before the first; some clients write none."""
    names: set[str] = set()
    capabilities = text.removeprefix(" ").split(" ") if text.strip(" ") else []
    for one in capabilities:
        match = _CAPABILITY.fullmatch(one)
        name = match[1] if match is not None else ""
        if match is None or name not in PUSH_CAPABILITIES or (match[2] is not None) != (name in _VALUED):
            raise GitRequestError(f"a push may use the capabilities {', '.join(sorted(PUSH_CAPABILITIES))}")
        if name in names:
            raise GitRequestError(f"the capability {name} comes twice")
        names.add(name)
    return tuple(capabilities)


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text)[:_MAX_REASON_CHARS]
