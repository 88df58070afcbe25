"""Confirmation of commands that replace something: shows what is removed and added, and asks before anything is
signed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ringfence.cli.shared.arguments import parse_scope, show_permission, show_scope
from ringfence.cli.shared.options import confirm
from ringfence.cli.shared.output import note
from ringfence.client.admin.scope_changes import with_added, with_removed
from ringfence.client.errors import ApiError, StaleApprovalError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.text import Lines
from ringfence.messages.base import Scope
from ringfence.model.records.seconders import sole_givers
from ringfence.model.scope.scope import missing

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import Administrator
    from ringfence.client.admin.preview import Loss
    from ringfence.model.records.directory import Directory, VerifiedRecord


@dataclass(frozen=True, slots=True)
class ScopeOptions:
    """How the options change a scope: as a whole (`--allow`, `--allow-nothing`), or in parts."""

    whole: Scope | None
    add: Scope = ()
    remove: Scope = ()

    def __bool__(self) -> bool:
        return self.whole is not None or bool(self.add or self.remove)

    @property
    def gives(self) -> bool:
        """Return whether the options name what is allowed, and not only what no longer is."""
        return self.whole is not None or bool(self.add)

    @property
    def permissions(self) -> Scope:
        """Return the permissions that the options allow, as written."""
        return (*(self.whole or ()), *self.add)

    def applied(self, held: Scope) -> Scope:
        """Return the scope after the change. Raises InvalidCallError, ScopeError."""
        if self.whole is not None:
            return self.whole
        return with_added(with_removed(held, self.remove), self.add)


def parse_scope_options(
    allow: Sequence[str] | None, nothing: bool, add: Sequence[str] | None, remove: Sequence[str] | None
) -> ScopeOptions:
    """Raises typer.BadParameter where the options contradict each other, or one is invalid."""
    if sum((bool(allow), nothing, bool(add or remove))) > 1:
        raise typer.BadParameter(
            "say the whole with --allow, or --allow-nothing; or what changes of it with --add and --remove",
            param_hint="--allow",
        )
    whole = parse_scope(allow, may_be_empty=True) if allow or nothing else None
    return ScopeOptions(whole, parse_scope(add, may_be_empty=True), parse_scope(remove, may_be_empty=True))


async def usage_of(api: ReadApi, agent: str) -> dict[str, Any] | None:
    """Return what an agent used in 30 days; None if it is not known, or not for this person to see."""
    try:
        usage: dict[str, Any] = await api.usage(agent)
    except ApiError:
        return None
    return usage


async def combinations_of(api: ReadApi, ceiling: Scope) -> list[str] | None:
    """Return the forbidden combinations that a ceiling would allow by itself; None if policy does not say."""
    try:
        return await api.combinations(ceiling)
    except ApiError:
        return None


def ceiling_findings(
    combinations: Sequence[str] | None, directory: Directory, people: Iterable[str], now_ms: int
) -> dict[str, Lines]:
    """Return what speaks against a whole ceiling, as fields for people; none if nothing does.

    Args:
        combinations: what `combinations_of` returned.
        people: the author of the ceiling, and the agent's sponsor.
    """
    fields = {}
    if combinations is None:
        fields["forbidden combinations"] = Lines(["not known: policy does not say"])
    elif combinations:
        fields["forbidden combinations"] = Lines(combinations)
    names = sorted(set(people))
    if givers := sole_givers(directory, names, now_ms):
        verb = "has" if len(names) == 1 else "have"
        text = f"{' and '.join(names)} {verb} all rights by the word of {', '.join(sorted(givers))} alone"
        fields["one person"] = Lines([text])
    return fields


def ceiling_lines(wanted: Scope, now: Scope, usage: Mapping[str, Any] | None) -> Lines:
    """Return a line for each permission and verb of a whole ceiling: what is new in it, or its use in 30 days.

    Args:
        now: the ceiling as it is.
        usage: what `usage_of` returned.
    """
    days = {(one["target"], one["verb"]): one["days"] for one in usage["used"]} if usage else {}
    lines = []
    for permission in wanted:
        for verb in permission.verbs:
            one = permission.model_copy(update={"verbs": (verb,)})
            used = days.get((one.target, verb), 0)
            if new := missing((one,), now):
                mark = "new" if new == (one,) else f"partly new: {show_scope(new)}"
            elif usage is None:
                mark = "its use is not known"
            else:
                mark = f"used on {used} of 30 days" if used else "not used in 30 days"
            lines.append(f"{show_permission(one)} ({mark})")
    return Lines(lines or ["nothing"])


def note_field(name: str, value: str) -> None:
    """Print a field for people on stderr, each of its lines on one of its own."""
    if isinstance(value, Lines) and "\n" in value:
        note(Lines([f"  {name}:", *(f"    {line}" for line in value.split("\n"))]))
    else:
        note(f"  {name}: {value}")


@dataclass(slots=True)
class Replacement:
    """The changes, line by line, and the leases that they end."""

    what: str
    """The name of what changes, e.g. `ceiling of deploy-bot`."""
    lines: dict[str, str] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)
    """The same changes for `--json`."""
    losses: list[Loss] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Further consequences, a sentence each."""

    def scope(self, name: str, before: Scope, after: Scope) -> None:
        self.lines |= {f"{name} before": show_scope(before), f"{name} after": show_scope(after)}
        if gone := missing(before, after):
            self.lines["taken away"] = show_scope(gone)
        if new := missing(after, before):
            self.lines["added"] = show_scope(new)
        self.document |= {"before": before, "after": after, "removed": gone, "added": new}

    def values(self, name: str, before: Iterable[str], after: Iterable[str]) -> None:
        """Add the change of a list of words, or of one word."""
        old, new = list(before), list(after)
        self.lines[name] = f"{', '.join(old) or 'none'}  ->  {', '.join(new) or 'none'}"
        self.document[name.replace(" ", "_")] = {"before": old, "after": new}

    async def ask(self, question: str, me: Path | None, *, yes: bool, quiet: bool) -> dict[str, Any]:
        """Show all changes, and ask. `quiet`: if no question is asked, such as with `--json`, show nothing.

        Returns the document for `--json`. Raises RingfenceError if the answer is no, WrongUseError if nobody is
        there to answer.
        """
        from ringfence.client.admin.preview import EndingLeases, ending_leases

        ending = EndingLeases()
        if self.losses:
            async with ReadApi(me) as api:
                ending = await ending_leases(api, self.losses)
        if not (quiet and yes):
            note(f"{self.what}:", "heading")
            for name, value in self.lines.items():
                note_field(name, value)
            note(f"  leases that end: {ending.describe()}", "warning" if ending.ids or ending.gap else "")
            for warning in self.warnings:
                note(f"  {warning}", "warning")
        confirm(question, yes)
        return {**self.document, "warnings": self.warnings, "leases_ending": ending.as_json()}


async def check_unchanged(
    administrator: Administrator, kind: Any, id: str, before: VerifiedRecord[Any]
) -> None:
    """Check that the record shown before the question is still the same. Raises StaleApprovalError."""
    now = (await administrator.connection.current_directory()).entry(kind, id)
    if now is None or now.revision != before.revision:
        raise StaleApprovalError(
            f"somebody changed {kind} {id} meanwhile, and nothing was done; look at it again"
        )
