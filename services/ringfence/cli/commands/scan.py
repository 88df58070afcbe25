"""`ringfence scan`: find credentials that agents inherit, and which containment rings they break."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.shared.options import JsonOption, WideOption, duration_s, wants_json
from ringfence.cli.shared.output import moment, note, output_file, print_json, print_table, say, write_output
from ringfence.cli.shared.progress import progress
from ringfence.cli.shared.tables import prose
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    from ringfence.scan.findings import Finding, Fingerprinter, Remedy, Report
    from ringfence.scan.scanner import ScanOptions

_PATTERNS = ("static-key", "user-token", "service-account", "password", "other")
_RINGS = ("1", "2", "3", "4")
_FAIL_ON = (*_PATTERNS, *_RINGS, "any")
_MOST_NOTES_SHOWN = 10
_KIB = 1024


class ScanFailedError(RingfenceError):
    """Raised where a scan ended by an unexpected error, whose message might quote a file."""

    code = Code.SCAN_FAILED


def _fail_on(values: list[str] | None) -> list[str]:
    for value in values or ():
        if value not in _FAIL_ON:
            raise typer.BadParameter(
                f"{value!r} is neither a ring nor a pattern; write one of: {', '.join(_FAIL_ON)}"
            )
    return values or []


def scan(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH...]",
            help="Folders and files. Without any: this machine's known places, environment, processes, and the "
            "working directory.",
            show_default=False,
        ),
    ] = None,
    all_processes: Annotated[
        bool,
        typer.Option(
            "--all-processes", help="Also read the environments of other users' processes, where allowed."
        ),
    ] = False,
    metadata: Annotated[
        bool,
        typer.Option(
            "--metadata",
            help="Ask the cloud's metadata service which role this machine has. The only connection that a scan opens.",
        ),
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="|".join(_FAIL_ON),
            callback=_fail_on,
            help="Exit 1 where a finding that the baseline lacks breaks this ring, or has this pattern. Also "
            "where something was not read. Repeatable.",
        ),
    ] = None,
    accept_unread: Annotated[
        list[str] | None,
        typer.Option(
            "--accept-unread",
            metavar="PATH",
            help="With --fail-on: accept that this path, or a path below it, was not read. Repeatable.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="FILE", help="Findings that are known: they are marked, and fail nothing."
        ),
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option(
            "--write-baseline",
            metavar="FILE",
            callback=output_file,
            help="Write a baseline: reader, path, field and pattern of each finding, and no digest of a value.",
        ),
    ] = None,
    sarif: Annotated[
        Path | None,
        typer.Option(
            "--sarif", metavar="FILE", callback=output_file, help="Write SARIF 2.1.0, for code scanning."
        ),
    ] = None,
    ocsf: Annotated[
        Path | None,
        typer.Option(
            "--ocsf", metavar="FILE", callback=output_file, help="Write OCSF Detection Findings, a line each."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            callback=output_file,
            help="Write a page that needs nothing from elsewhere.",
        ),
    ] = None,
    with_scanner: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="kingfisher|detect-secrets|gitleaks",
            help="Include what this installed scanner finds, without its online validation. Repeatable.",
        ),
    ] = None,
    details: Annotated[
        bool,
        typer.Option("--details", help="Print each finding in full: what it opens, why, and the way out."),
    ] = False,
    max_size: Annotated[
        int,
        typer.Option(
            "--max-size", metavar="KIB", min=1, max=1024 * 1024, help="The largest file that is read."
        ),
    ] = 8192,
    time_limit: Annotated[
        str, typer.Option("--time-limit", metavar="DURATION", help="How long the scan may take.")
    ] = "10m",
    no_history: Annotated[
        bool,
        typer.Option(
            "--no-history", help="Neither compare with the last scan of these paths, nor remember this one."
        ),
    ] = False,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find credentials that agents inherit, and say which containment rings each breaks and what replaces it.

    Needs no server and no account. Prints, stores and sends no secret: what leaves a reader is a keyed fingerprint and
    a length.

    Nothing that is found is executed, no link out of a scanned folder is followed, and no connection is opened without
    --metadata.
    """
    from ringfence.scan.output_guard import protect_process

    protect_process()
    try:
        options = _options(paths or [], duration_s(time_limit), max_size, all_processes, metadata)
        report = _scan(
            options, with_scanner or [], as_json=as_json, history=not no_history, baseline=baseline
        )
        _write_files(report, sarif, ocsf, html, write_baseline)
    except (RingfenceError, typer.BadParameter, typer.Exit, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - all of them, see below
        # Neither its message nor a traceback: both may quote what was read.
        raise ScanFailedError(
            f"the scan ended by an unexpected error ({type(error).__name__}); report it with the paths that you gave"
        ) from None
    if wants_json(as_json):
        from ringfence.scan.reports import report_document

        print_json(report_document(report))
    else:
        _print(report, wide=wide, details=details)
    if failing := _failing(report, fail_on or [], accept_unread or []):
        note(f"error: {failing}", "error")
        raise typer.Exit(1)


def _options(
    paths: list[Path], time_limit_s: int, max_size_kib: int, all_processes: bool, metadata: bool
) -> ScanOptions:
    from ringfence.scan.readers.reader import Machine
    from ringfence.scan.scanner import ScanOptions

    if paths and (all_processes or metadata):
        raise typer.BadParameter("--all-processes and --metadata are for a scan of the machine: give no path")
    return ScanOptions(
        paths=paths or _working_directory(),
        machine=None if paths else Machine(all_processes=all_processes, metadata=metadata),
        max_bytes=max_size_kib * _KIB,
        time_limit_s=time_limit_s,
    )


def _scan(
    options: ScanOptions, scanners: list[str], *, as_json: bool, history: bool, baseline: Path | None
) -> Report:
    from ringfence.scan.external_scanners import adapters, include
    from ringfence.scan.findings import state_folder
    from ringfence.scan.reports import apply_baseline, compare_with_last, load_baseline
    from ringfence.scan.scanner import scanning

    known = load_baseline(baseline) if baseline is not None else None
    chosen = adapters(scanners)
    folder = state_folder()
    fingerprinter, problem = _fingerprinter(folder)
    with scanning(options, fingerprinter) as scanner, progress("reading files", as_json=as_json) as line:
        report = scanner.run(line.count)
    if problem:
        note(problem, "warning")
    for adapter in chosen:
        include(report, adapter, [str(path) for path in options.paths], scanner.guard)
    if known is not None:
        apply_baseline(report, known)
    elif history and folder is not None and not problem:
        compare_with_last(report, folder)
    return report


def _working_directory() -> list[Path]:
    """Return the working directory for a scan of the machine, unless it is the home folder or above: too much."""
    here, home = Path.cwd(), Path.home()
    if here == home or here in home.parents or here == Path("/"):
        return []
    return [Path()]


def _fingerprinter(folder: Path | None) -> tuple[Fingerprinter, str]:
    """Return what makes fingerprints, and a warning where they cannot be compared with those of other scans."""
    import secrets

    from ringfence.scan.findings import Fingerprinter, load_key

    problem = "there is no home folder: fingerprints are for this scan alone; set HOME or XDG_STATE_HOME"
    if folder is not None:
        try:
            return Fingerprinter(load_key(folder)), ""
        except (OSError, ValueError, RingfenceError):
            problem = f"the key in {folder} cannot be used: fingerprints are for this scan alone; see owner and mode"
    return Fingerprinter(secrets.token_bytes(32)), f"warning: {problem}"


def _write_files(
    report: Report, sarif: Path | None, ocsf: Path | None, html: Path | None, write_baseline: Path | None
) -> None:
    import json

    from ringfence import __version__
    from ringfence.cli.shared.output import escaped_json

    if sarif is not None:
        from ringfence.scan.reports import sarif_document

        write_output(sarif, escaped_json(json.dumps(sarif_document(report, __version__), indent=1)) + "\n")
    if ocsf is not None:
        from ringfence.scan.reports import ocsf_events

        lines = [escaped_json(json.dumps(one)) + "\n" for one in ocsf_events(report, __version__)]
        write_output(ocsf, "".join(lines))
    if html is not None:
        from ringfence.scan.reports import html_document

        write_output(html, html_document(report, __version__).encode("utf-8", "replace"))
    if write_baseline is not None:
        from ringfence.scan.reports import baseline_text

        # It holds no secret, and is meant to be committed.
        write_output(write_baseline, escaped_json(baseline_text(report.findings)), public=True)


def _print(report: Report, *, wide: bool, details: bool) -> None:
    from ringfence.scan.reports import by_target, matrix
    from ringfence.scan.rings import RING_NAMES

    for target, findings in by_target(report.findings):
        if details:
            for one in findings:
                _print_finding(one)
            _print_remedies(dict.fromkeys(step for one in findings for step in one.remedies))
            continue
        say(f"{target}: breaks {_broken(findings[0])}", "heading")
        for one in findings:
            say(f"  {_place(one)}")
            others = len(one.shared_with)
            shared = f"; the same value is in {others} more place{'s' * (others > 1)}" if others else ""
            say(f"    {one.title}, {one.place.field}{shared}")
    if rows := matrix(report):
        if not details:
            say("")
        print_table(
            [prose("pattern"), "found", *RING_NAMES.values()],
            ([title, str(count), *states] for title, count, states in rows),
            empty="", wide=wide,
        )  # fmt: skip
        say("")
    _print_summary(report, details=details)


def _place(one: Finding) -> str:
    mark = " (in the baseline)" if one.known else ""
    return f"{one.place}{mark}"


def _broken(one: Finding) -> str:
    """Return the names of the rings that it breaks."""
    from ringfence.scan.rings import RING_NAMES

    broken = [
        f"{'partly ' * (ring.state == 'partly')}{RING_NAMES[ring.ring]}"
        for ring in one.rings
        if ring.state != "unknown"
    ]
    return ", ".join(broken)


def _print_finding(one: Finding) -> None:
    from ringfence.cli.shared.output import print_fields

    opens = one.opens.words()
    expires = opens.pop("expires_s", None)
    facts = {
        "where": _place(one),
        "field": one.place.field,
        "opens": "; ".join(
            f"{name}: {', '.join(value) if isinstance(value, tuple) else value}"
            for name, value in opens.items()
        )
        or "not known offline",
        "expires": moment(expires) if expires else "",
        "used by": ", ".join(one.used_by),
        "readable by": one.readable_by if one.readable_by != "unknown" else "",
        "also in": ", ".join(map(str, one.shared_with)),
        "value": f"{one.length} characters, fingerprint {one.fingerprint}" if one.fingerprint else "not read",
        "remarks": "; ".join(one.remarks),
        "breaks": _broken(one),
    }
    print_fields({name: value for name, value in facts.items() if value}, title=one.title)


def _print_remedies(steps: Iterable[Remedy]) -> None:
    for number, step in enumerate(steps, start=1):
        say(f"{number}. {step.purpose}{f': {step.url}' if step.url else ''}")
        if step.command:
            say(f"   {step.command}", "heading")
    say("")


def _print_summary(report: Report, *, details: bool) -> None:
    from ringfence.scan.remedies import is_adoptable
    from ringfence.scan.reports import summary

    totals = summary(report)
    count, new = totals["findings"], totals["new"]
    rate = f"{report.files} file{'' if report.files == 1 else 's'} in {report.elapsed_s:.1f} s"
    if not count:
        say(f"nothing found in {rate}")
    else:
        known = f", {count - new} of them in the baseline" if count != new else ""
        shared = f", {totals['shared']} in several places" if totals["shared"] else ""
        say(f"{count} credential{'' if count == 1 else 's'} that agents inherit{known}{shared}; {rate}")
        say("what the rings mean, and why each is broken: docs/scan.md")
        if not details:
            say("what each credential opens, and the commands that replace it: ringfence scan --details")
            if any(
                is_adoptable(one.reader, one.pattern, one.opens.service, one.kind) for one in report.findings
            ):
                say("replace one, step by step: ringfence adopt FILE")
    if report.gone:
        since = f" since {moment(report.gone_since_s)}" if report.gone_since_s else ""
        say(f"gone{since}: {len(report.gone)}")
        for gone in report.gone[:_MOST_NOTES_SHOWN]:
            say(f"  {gone.path}, {gone.field}")
    limiting = [one for one in report.notes if one.limits]
    for one in limiting[:_MOST_NOTES_SHOWN]:
        note(f"not read: {one.path} {one.reason}", "warning")
    if len(limiting) > _MOST_NOTES_SHOWN:
        note(f"not read: {len(limiting) - _MOST_NOTES_SHOWN} more; --json has them all", "warning")
    if not report.complete:
        note("warning: not everything was read", "warning")


def _failing(report: Report, wanted: list[str], accepted: list[str]) -> str:
    """Return why the exit status is 1, or an empty text."""
    if not wanted:
        return ""
    rings = {int(one) for one in wanted if one in _RINGS}
    count = sum(
        not one.known
        and ("any" in wanted or one.pattern.value in wanted or not rings.isdisjoint(one.broken_rings()))
        for one in report.findings
    )
    if count:
        return f"{count} new finding{'' if count == 1 else 's'} of --fail-on {' --fail-on '.join(wanted)}"
    if not report.complete:
        return "the scan ended before everything was read; raise --time-limit, or scan fewer folders"
    unread = [one.path for one in report.notes if one.limits and not _is_accepted(one.path, accepted)]
    if not unread:
        return ""
    return f"not everything was read: {len(unread)} paths; accept each with --accept-unread PATH, or raise --max-size"


def _is_accepted(path: str, accepted: list[str]) -> bool:
    path = os.path.normpath(path) if path else ""
    return any(path == one or _is_below(path, one) for one in map(os.path.normpath, filter(None, accepted)))


def _is_below(path: str, folder: str) -> bool:
    if folder == ".":  # a note may have the name of a reader in place of a path
        return path.partition("/")[0] not in ("", "..") and os.path.lexists(path)
    return path.startswith(f"{folder.rstrip('/')}/")
