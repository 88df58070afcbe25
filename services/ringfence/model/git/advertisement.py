"""Filters the refs and capabilities that a Git server advertises: clients learn of what the gateway lets pass."""

from __future__ import annotations

from typing import Final

from ringfence.model.git.endpoints import GitService
from ringfence.model.git.pkt_lines import MAX_LINE_BYTES, GitRequestError, Special, packet, read_packet
from ringfence.model.git.push import PUSH_CAPABILITIES

_VERSIONS: Final = {b"version 1": 1, b"version 2": 2}
_URIS_COMMAND: Final = b"bundle-uri"
_URIS_FEATURE: Final = b"packfile-uris"
_FETCH: Final = b"fetch="
_MAX_HELD_BYTES: Final = 2 * MAX_LINE_BYTES


class AdvertisementFilter:
    """Filters one advertisement while it arrives. Only the lines with capabilities are held back."""

    def __init__(self, service: GitService) -> None:
        self._service = service
        self._buffer = bytearray()
        self._version: int | None = None
        """None before the first line."""
        self._announced = False
        """Whether the flush packet after the name of the service has passed."""
        self._filtered = False
        """Whether all capabilities have passed."""

    def feed(self, piece: bytes) -> bytes:
        """The filtered bytes that are complete now. Raises GitRequestError for what is no advertisement."""
        self._buffer += piece
        out, at = bytearray(), 0
        while (found := None if self._filtered else read_packet(self._buffer, at)) is not None:
            one, at = found
            out += self._filter(one) if isinstance(one, bytes) else self._special(one)
        del self._buffer[:at]
        if self._filtered:
            out += self._buffer
            self._buffer.clear()
        elif len(self._buffer) > _MAX_HELD_BYTES:
            raise GitRequestError("a line of the advertisement does not end")
        return bytes(out)

    def last(self, piece: bytes) -> bytes:
        """As `feed`, at the end."""
        out = self.feed(piece)
        if not self._filtered:
            raise GitRequestError("the advertisement is cut off")
        return out

    def _special(self, one: Special) -> bytes:
        """The flush packet after the name of the service, or that at the end."""
        if one is Special.DELIM or self._version is None:
            raise GitRequestError("this is no advertisement of smart HTTP")
        self._filtered = self._version == 2 or self._announced
        self._announced = True
        return bytes(one.value)

    def _filter(self, line: bytes) -> bytes:
        text = line.removesuffix(b"\n")
        if self._version is None:
            if text == b"# service=" + self._service.encode():
                self._version = 0
                return packet(line)
            if text not in _VERSIONS:
                raise GitRequestError("this is no advertisement of smart HTTP")
        if text in _VERSIONS:
            self._version = _VERSIONS[text]
            return packet(line)
        if self._version == 2:
            return self._second_version(line, text)
        self._filtered = True
        ref, nul, capabilities = text.partition(b"\0")
        if not nul:
            return packet(line)
        kept = [one for one in capabilities.split(b" ") if one and self._passes(one)]
        return packet(ref + b"\0" + b" ".join(kept) + b"\n")

    def _second_version(self, line: bytes, text: bytes) -> bytes:
        if text.partition(b"=")[0] == _URIS_COMMAND:
            return b""
        if text.startswith(_FETCH):
            features = text.removeprefix(_FETCH).split(b" ")
            return packet(_FETCH + b" ".join(one for one in features if one != _URIS_FEATURE) + b"\n")
        return packet(line)

    def _passes(self, capability: bytes) -> bool:
        name = capability.partition(b"=")[0].decode("latin-1")
        return self._service == "git-upload-pack" or name in PUSH_CAPABILITIES
