"""The report as one HTML file without scripts or anything from elsewhere, with the matrix of patterns and rings."""

from __future__ import annotations

from html import escape

from ringfence.kernel.base.text import visible
from ringfence.kernel.base.times import utc_text
from ringfence.scan.findings import Finding, Report
from ringfence.scan.reports.json_report import matrix, summary
from ringfence.scan.rings import RING_NAMES

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1c2026;background:#fff}
table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{border:1px solid #d5d9e0;padding:.4rem .6rem;text-align:left;vertical-align:top}th{background:#f3f5f8}
code,pre{font:13px ui-monospace,monospace;background:#f3f5f8;padding:.1rem .3rem}
pre{padding:.6rem;white-space:pre-wrap;overflow-wrap:anywhere}.violated,.compromised{background:#fbdcd9}
.partly{background:#fdf0cc}.unknown{background:#eceff3}section{border-top:1px solid #d5d9e0;margin-top:1.5rem}
@media (prefers-color-scheme:dark){body{color:#e6e8eb;background:#14171b}th,code,pre{background:#22272e}
th,td,section{border-color:#3a414b}.violated,.compromised{background:#5a211c}.partly{background:#54430f}
.unknown{background:#2b313a}}
"""


def html_document(report: Report, version: str) -> str:
    """Return the page. `version`: of this program."""
    totals = summary(report)
    began = _moment(report.began_s)
    rows = "".join(
        f"<tr><th scope=row>{escape(title)}</th><td>{count}</td>"
        + "".join(f'<td class="{state}">{state}</td>' for state in states)
        + "</tr>"
        for title, count, states in matrix(report)
    )
    heads = "".join(f"<th scope=col>ring {ring}, {name}</th>" for ring, name in RING_NAMES.items())
    notes = "".join(f"<li><code>{_text(note.path)}</code> {_text(note.reason)}</li>" for note in report.notes)
    gone = "".join(f"<li><code>{_text(one.path)}</code> {_text(one.field)}</li>" for one in report.gone)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name=viewport content="width=device-width"><title>Inherited credentials</title>'
        f"<style>{_STYLE}</style></head><body><h1>Inherited credentials</h1>"
        f"<p>{_counted(totals['findings'], 'finding')} in {_counted(report.files, 'file')} of "
        f"{_text(', '.join(report.roots))}, {began}, "
        f"ringfence {escape(version)}. {totals['shared']} of them stand in several places. "
        + ("" if report.complete else "<strong>Not everything was read.</strong>")
        + "</p>"
        + (
            "<p><em>unknown</em> is never good: a scan cannot see whether outputs are validated, or "
            "promotion is gated.</p>"
            f"<table><thead><tr><th scope=col>pattern</th><th scope=col>found</th>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
            if rows
            else "<p>Nothing was found.</p>"
        )
        + "".join(map(_section, report.findings))
        + (f"<section><h2>Gone since the last scan</h2><ul>{gone}</ul></section>" if gone else "")
        + (f"<section><h2>Not read</h2><ul>{notes}</ul></section>" if notes else "")
        + "</body></html>\n"
    )


def _section(finding: Finding) -> str:
    known_offline = finding.opens.words()
    expires_s = known_offline.pop("expires_s", None)
    opens = "; ".join(
        f"{name}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in known_offline.items()
    )
    facts = [
        ("where", f"{finding.place}, {finding.place.field}"),
        ("opens", opens or "not known offline"),
        ("expires", _moment(expires_s) if expires_s else ""),
        ("used by", ", ".join(finding.used_by) or "not known"),
        ("can be read by", finding.readable_by),
        ("also in", ", ".join(map(str, finding.shared_with))),
        ("remarks", "; ".join(finding.remarks)),
    ]
    lines = "".join(
        f"<tr><th scope=row>{name}</th><td>{_text(value)}</td></tr>" for name, value in facts if value
    )
    rings = "".join(
        f'<tr><th scope=row>ring {one.ring}, {RING_NAMES[one.ring]}</th><td class="{one.state}">{one.state}: '
        f"{_text(one.why)}</td></tr>"
        for one in finding.rings
    )
    steps = "".join(
        f"<li>{_text(one.purpose)}"
        + (f"<pre>{_text(one.command)}</pre>" if one.command else "")
        + (f" <code>{_text(one.url)}</code>" if one.url else "")
        + "</li>"
        for one in finding.remedies
    )
    known = " (in the baseline)" if finding.known else ""
    return (
        f"<section><h2>{_text(finding.title)}{known}</h2><table>{lines}{rings}</table><h3>The way out</h3>"
        f"<ol>{steps}</ol></section>"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _moment(unix_s: int) -> str:
    return utc_text(unix_s)


def _text(text: str) -> str:
    return escape(visible(text))
