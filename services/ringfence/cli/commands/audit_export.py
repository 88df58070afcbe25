"""`ringfence audit export`: write the audit trail to a file, as OCSF or CSV."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, Literal, cast

import typer

from ringfence.cli.shared.audit_filters import (
    AgentFilter,
    CodeFilter,
    SeverityFilter,
    SponsorFilter,
    StatusFilter,
    TargetFilter,
    TaskFilter,
    UserFilter,
    filters_of,
)
from ringfence.cli.shared.id_lookup import whole_id
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    SinceOption,
    identity,
    run,
    span_ms,
    wants_json,
)
from ringfence.cli.shared.output import (
    escaped_json,
    is_stdout,
    moment,
    note,
    output_file,
    print_json,
    say,
    visible,
)
from ringfence.cli.shared.progress import counting
from ringfence.client.reports.read_api import ReadApi

if TYPE_CHECKING:
    from ringfence.client.exports import ExportFile, ExportProgress, ExportQuery, ExportWriter, Format

_FORMATS: Final = ("ocsf", "csv")


def _format_of(text: str) -> str:
    if text not in _FORMATS:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(_FORMATS)}")
    return text


def export(
    format: Annotated[
        Literal["ocsf", "csv"],
        typer.Option(
            "--format", metavar="FORMAT", parser=_format_of, help="ocsf: one event a line, to the byte; csv."
        ),
    ] = "ocsf",
    since: SinceOption = "30d",
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="WHEN", help="Until when, not included; until now where not given."),
    ] = None,
    agent: AgentFilter = None,
    task: TaskFilter = None,
    target: TargetFilter = None,
    class_uid: Annotated[
        int | None,
        typer.Option("--class", metavar="NUMBER", min=1, max=999_999, help="Only this OCSF class, as 3003."),
    ] = None,
    user: UserFilter = None,
    sponsor: SponsorFilter = None,
    code: CodeFilter = None,
    status: StatusFilter = None,
    severity: SeverityFilter = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", callback=output_file, help="A new file; stdout if not given, or -."
        ),
    ] = None,
    go_on: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the export to --out that stopped, as it was asked for."),
    ] = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the events of a period, oldest first; the same question about the past gives the same file.

    Operators and auditors see all, sponsors what concerns their agents, others what is on their behalf. A file is
    FILE.part until it is whole.
    """
    from ringfence.client.exports import ExportQuery, begin, resume, set_filters

    out = None if out is None or is_stdout(out) else out
    if out is None and go_on:
        raise typer.BadParameter("--resume needs a file: add -o FILE")
    since_ms, until_ms = span_ms(since, until, int(time.time() * 1000))
    filters = filters_of(
        target=target, user=user, sponsor=sponsor, codes=code, status=status, severity=severity
    )
    task_id = run(whole_id("task", task, identity(me))) if task else None
    filters = set_filters({"agent": agent, "task": task_id, "class": class_uid, **filters})
    question = ExportQuery(format=format, since_ms=since_ms, until_ms=until_ms, filters=filters)
    if out is None:
        _to_stdout(question, me)
        return
    state = _to_file(resume(out) if go_on else begin(out, question), out, me)
    if wants_json(as_json):
        print_json({"file": str(out), "events": state.events, **state.question.model_dump()})
    else:
        say(f"{state.events} events in {out}")


class _Terminal:
    """Stdout that is a terminal: control and invisible characters are written as code points."""

    def __init__(self, format: Format) -> None:
        self._shown = _visible_rows if format == "csv" else escaped_json

    def write(self, data: bytes) -> int:
        """Print whole lines of UTF-8."""
        sys.stdout.write(self._shown(data.decode(errors="backslashreplace")))
        return len(data)

    def flush(self) -> None:
        sys.stdout.flush()


def _visible_rows(text: str) -> str:
    """Make characters visible as in tables for people: CSV has no escapes."""
    return "\r\n".join(map(visible, text.split("\r\n")))


def _to_stdout(question: ExportQuery, me: Path | None) -> None:
    from ringfence.client.exports import ExportProgress, writer_of

    state = ExportProgress(question=question)
    sys.stdout.flush()
    # Byte for byte for programs. On a terminal, text of strangers could act on it.
    file = _Terminal(question.format) if sys.stdout.isatty() else sys.stdout.buffer
    writer = writer_of(question.format, cast("BinaryIO", file))
    try:
        run(_all(state, writer, me))
    except BaseException:
        note(_stopped(state), "warning")
        raise
    finally:
        sys.stdout.flush()
    note(f"{state.events} events")


def _to_file(one: ExportFile, out: Path, me: Path | None) -> ExportProgress:
    try:
        run(_all(one.state, one.writer, me, one))
    except BaseException:
        one.abort()
        note(_stopped(one.state) + _next_steps(one, out), "warning")
        raise
    one.finish()
    return one.state


def _next_steps(one: ExportFile, out: Path) -> str:
    return f"; go on with: ringfence audit export --resume -o {out}" if one.can_be_resumed else ""


async def _all(
    state: ExportProgress, writer: ExportWriter, me: Path | None, one: ExportFile | None = None
) -> None:
    from ringfence.client.exports import export_pages

    async with ReadApi(identity(me)) as api:
        # Events that go to the terminal show by themselves how far it is.
        with counting("reading events", quiet=one is None and sys.stdout.isatty()) as progress:
            await export_pages(api, state, writer, progress, one.checkpoint if one else lambda: None)


def _stopped(state: ExportProgress) -> str:
    from ringfence.client.exports import stopped_at_ms

    at_ms = stopped_at_ms(state)
    if at_ms is None:
        return "stopped before the first event was written"
    return f"stopped after {state.events} events, at {moment(at_ms / 1000)}; it is not whole"
