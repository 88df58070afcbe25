"""Access report: who could reach a target, by policy, and who acted there, by audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi

_BY: Final = ("agent", "sponsor", "on_behalf_of")
_COUNTS: Final = ("allowed", "denied", "observed", "leases", "handed_out", "unverified")


@dataclass(slots=True)
class AccessReport:
    """The report for one target. `docs/asking-audit.md` describes its rows."""

    target: str
    verb: str | None
    resource: str | None
    since_ms: int
    until_ms: int
    could: list[dict[str, Any]] | None = None
    """None if policy does not answer."""
    exists: bool | None = None
    """Whether there is such a target now; None if policy does not answer."""
    did: dict[tuple[str | None, ...], dict[str, Any]] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add groups that audit counted, in the order of time."""
        for line in lines:
            row = self.did.setdefault(
                tuple(line[name] for name in _BY), {**line, **dict.fromkeys(_COUNTS, 0)}
            )
            for name in _COUNTS:
                row[name] += line[name]
            row["first_ms"] = min(row["first_ms"], line["first_ms"])
            row["last_ms"] = max(row["last_ms"], line["last_ms"])
            row["lease"] = line["lease"] or row["lease"]

    def rows(self) -> list[dict[str, Any]]:
        """Return who acted, by the time of their last action."""
        return sorted(self.did.values(), key=lambda line: (line["last_ms"], *map(str, map(line.get, _BY))))

    def total(self, name: str) -> int:
        """Return the sum of one count over all rows."""
        return sum(line[name] for line in self.did.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "verb": self.verb,
            "resource": self.resource,
            "since_ms": self.since_ms,
            "until_ms": self.until_ms,
            "could": self.could,
            "did": self.rows(),
            "gaps": self.gaps,
        }


async def access_report(
    api: ReadApi,
    target: str,
    since_ms: int,
    until_ms: int,
    progress: Callable[[float], None],
    *,
    verb: str | None = None,
    resource: str | None = None,
) -> AccessReport:
    """Build the report, as far as the caller may see.

    `progress` is called with the share read, from 0 to 1. Where policy does not answer, the report has a gap. Raises
    ApiError where audit does not answer, or either rejects the query.
    """
    report = AccessReport(target, verb, resource, since_ms, until_ms)
    await _add_reach(api, report)
    query: dict[str, str | int | None] = {
        "target": target, "verb": verb, "resource": resource, "since_ms": since_ms, "until_ms": until_ms
    }  # fmt: skip
    after: str | None = None
    while True:
        page = await api.get("audit", "who", **query, after=after)
        report.add(page["lines"])
        after = page["after"]
        if after is None:
            break
        progress(max(page["looked_at_ms"][1] - since_ms, 0) / max(until_ms - since_ms, 1))
    progress(1.0)
    report.gaps += _blind_spots(report)
    return report


async def _add_reach(api: ReadApi, report: AccessReport) -> None:
    agents: list[dict[str, Any]] = []
    after: str | None = None
    try:
        while True:
            page = await api.get(
                "policy",
                "reach",
                target=report.target,
                verb=report.verb,
                resource=report.resource,
                after=after,
            )
            agents += page["agents"]
            report.gaps += [gap for gap in page["gaps"] if gap not in report.gaps]
            after = page["after"]
            if after is None:
                break
    except ApiError as error:
        if error.status is not None and 400 <= error.status < 500:
            raise
        report.gaps.append(f"who could: {error}")
        return
    report.exists = bool(page["exists"])
    if not report.exists:
        report.gaps.append(f"there is no target {report.target} now: nobody can be given anything for it")
    report.could = agents


def _blind_spots(report: AccessReport) -> list[str]:
    """Return sentences about what neither gateways nor records can show."""
    sentences = []
    handed_out, unverified = report.total("handed_out"), report.total("unverified")
    if handed_out:
        sentences.append(
            f"{handed_out} of the credentials were handed to the agents themselves: what they did with these past "
            f"gateways, only the logs of {report.target} say"
        )
    if not report.total("allowed") + report.total("denied") + report.total("observed"):
        sentences.append(
            f"no gateway told of an action at {report.target} that fits: nobody did anything through one, or none "
            "stands before it"
        )
    if unverified:
        sentences.append(f"{unverified} leases were not signed by an issuer, and are not counted as issued")
    return sentences
