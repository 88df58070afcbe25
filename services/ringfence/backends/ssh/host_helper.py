#!/usr/bin/python3 -IS
"""Runs on a host that agents reach by ssh, as root: says who is let in, and ends the sessions of leases that are over.

It needs nothing but Python 3.9 and the OpenSSH server, which starts it; no process of it is there in between, but those
that Ringfence itself is connected to.

    init                                 make the folder of the state, once, before the server is told of it
    serve                                answer Ringfence: one JSON object a line, in and out
    principals USER SERIAL KEYID CA      AuthorizedPrincipalsCommand: may this certificate log in as this user?
    run USER VERB:NAME...                force-command of certificates: run that of these commands which is asked for

What stands here is what was announced: a file for each lease under `open/`. The KRL revokes every serial of Ringfence's
authorities but those, so a state that is lost lets nobody in. Which server processes serve a lease is written down
under `sessions/` when they ask `principals`, under the same lock that an undo takes: what logs in while its lease is
undone is refused, or found.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import signal
import stat
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

CONFIG = "/etc/ringfence-ssh.json"
PROTOCOL = 1
KEY_ID = "ringfence:"
"""Prefix of the key ids of certificates. The name of the lease follows, `<trust domain>.<lease id>`."""
PRINCIPAL = "ringfence:"
"""Prefix of principals.

The user follows. No user name has a colon, so a server accepts them only through this program.
"""
COMMAND_VERBS = ("read", "write")
WAYS = ("shell", "terminal", "forward")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,252}\.[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,252}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_COMMAND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LAST_SERIAL = 2**64 - 1
_PROC = "/proc"
_CGROUPS = "/sys/fs/cgroup"
_END_WITHIN_S = 2.0
_LONGEST_LINE = 65_536
_HEAD_BYTES = 44
"""Length of the head of every KRL: its version and time, nothing about what it revokes."""


class RefusedError(Exception):
    """Raised when a request is impossible here. A retry will fail again."""


class FailedError(Exception):
    """Raised when a request failed. A retry may succeed."""


def serial_of(name: str) -> int:
    """Return the serial of a lease's certificates. It is never 0, which no KRL can revoke."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") or 1


# --- the configuration ------------------------------------------------------------------------------------------------


class Config:
    """The host administrator's settings: whose certificates count, and what they can allow."""

    def __init__(self, path: str) -> None:
        """Raises FailedError if the file is missing or wrong."""
        self.path = path
        document = _trusted_json(Path(path))
        try:
            self.authorities = [base64.b64decode(line.split()[1]) for line in document["authorities"]]
            self.state = Path(document.get("state", "/var/lib/ringfence-ssh"))
            self.broker = document.get("broker", "ringfence-broker")
            self.users = {name: _user(name, of, self.broker) for name, of in document["users"].items()}
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise FailedError(f"{path} is wrong: {type(error).__name__} {error}") from None

    def is_authority(self, fingerprint: str) -> bool:
        """Return whether this is the fingerprint (in the format of `%F`) of one of Ringfence's authorities."""
        fingerprints = (base64.b64encode(hashlib.sha256(blob).digest()) for blob in self.authorities)
        return any(fingerprint == "SHA256:" + digest.decode().rstrip("=") for digest in fingerprints)


def _trusted_json(path: Path) -> Any:
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & 0o022:
                raise FailedError(f"{path} can be changed by others: it must be root's, mode 0644")
            return json.load(file)
    except (OSError, ValueError) as error:
        raise FailedError(f"cannot read {path}: {type(error).__name__}") from None


def _user(name: str, of: Any, broker: str) -> dict[str, Any]:
    if not _USER.fullmatch(name) or name == broker:
        raise ValueError(f"no certificate can be for user {name!a}")
    if unknown := of.keys() - {*COMMAND_VERBS, "may", "agents_only"}:
        raise ValueError(f"user {name} has {sorted(unknown)!a}")
    if not isinstance(of.get("agents_only", False), bool):
        raise ValueError(f"user {name}: agents_only is true or false")
    if unknown := set(of.get("may", ())) - set(WAYS):
        raise ValueError(f"user {name} may {sorted(unknown)!a}")
    for verb in COMMAND_VERBS:
        for command, argv in of.get(verb, {}).items():
            if not _COMMAND.fullmatch(command) or not isinstance(argv, list) or not argv[0].startswith("/"):
                raise ValueError(f"command {command!a} of user {name}: write a list that begins with a path")
    return dict(of)


# --- the KRL ----------------------------------------------------------------------------------------------------------


def krl(authorities: Iterable[bytes], serials: Iterable[int], version: int, now_s: int) -> bytes:
    """Return a key revocation list (OpenSSH's PROTOCOL.krl) that revokes all serials of these authorities except
    `serials`.
    """
    ranges = b"".join(
        b"\x21" + _string(struct.pack(">QQ", first, last)) for first, last in _gaps(sorted(set(serials)))
    )
    sections = (b"\x01" + _string(_string(ca) + _string(b"") + ranges) for ca in authorities)
    head = struct.pack(">8sIQQQ", b"SSHKRL\n\0", 1, version, now_s, 0) + _string(b"") + _string(b"")
    return head + b"".join(sections)


def _gaps(serials: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges between these serials, which are in order. No range contains 0: no KRL can name it."""
    first = 1
    for serial in serials:
        if first < serial:
            yield first, serial - 1
        first = serial + 1
    if first <= _LAST_SERIAL:
        yield first, _LAST_SERIAL


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


# --- the state --------------------------------------------------------------------------------------------------------


class State:
    """The state files in one folder, which only root can read."""

    def __init__(self, config: Config) -> None:
        os.umask(0o077)
        self._config = config
        self._open = config.state / "open"
        self._sessions = config.state / "sessions"

    def make(self) -> None:
        """Create the missing files and folders."""
        for folder in (self._config.state, self._open, self._sessions):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)  # an existing one may be open to others
        with self._locked():
            self._publish()

    def announce(self, name: str, user: str, deadline_s: int) -> None:
        """Accept certificates of a lease for this user until the deadline. Raises RefusedError."""
        with self._locked():
            announced = self._read(name)
            if announced is not None and announced["user"] != user:
                raise RefusedError("the lease is for another user")
            if any(serial_of(other) == serial_of(name) for other in _names(self._open) if other != name):
                raise RefusedError("another lease has the same serial: ask again")
            _write(self._open / name, json.dumps({"user": user, "deadline": deadline_s}).encode())
            self._publish()  # if a power cut removes either, the lease is refused

    def undo(self, name: str) -> None:
        """Refuse logins for a lease and end its sessions. Returns once they have ended. Raises FailedError."""
        with self._locked():
            if (self._open / name).exists():
                (self._open / name).unlink()
                _sync(self._open)
            self._publish()
            _sync(self._config.state)
            sessions = self._logged_in(name)
        end_all(sessions)
        with self._locked():
            self._forget(name)
            self._clear()

    def standing(self, domain: str) -> list[str]:
        """Return the leases of a trust domain that are open or have sessions."""
        names = {*_names(self._open), *_names(self._sessions)}
        return sorted(name[-36:] for name in names if _NAME.fullmatch(name) and name[:-37] == domain)

    def login(self, name: str, user: str, session: Session) -> bool:
        """Return whether a certificate of this lease may log in as this user. If so, the session is recorded."""
        with self._locked():
            announced = self._read(name)
            if announced is None or announced["user"] != user or announced["deadline"] <= time.time():
                return False
            self._forget(name)
            (self._sessions / name).mkdir(exist_ok=True)
            (self._sessions / name / str(session)).touch()
            return True

    def _logged_in(self, name: str) -> list[Session]:
        with contextlib.suppress(FileNotFoundError):
            return [Session.parse(entry) for entry in _names(self._sessions / name)]
        return []

    def _forget(self, name: str) -> None:
        """Drop the records of sessions that have ended."""
        for session in self._logged_in(name):
            if not session.lives():
                (self._sessions / name / str(session)).unlink()
        with contextlib.suppress(OSError):
            (self._sessions / name).rmdir()

    def _clear(self) -> None:
        """End all processes of users that only agents use and that have no open lease, whatever started them."""
        users = [name for name, of in self._config.users.items() if of.get("agents_only")]
        if users:
            in_use = {(self._read(name) or {}).get("user") for name in _names(self._open)}
            end_users(user for user in users if user not in in_use)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads((self._open / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return content

    def _publish(self) -> None:
        """Write the KRL for the open leases and rename it into place. The server reads it whole at every login."""
        path = self._config.state / "krl"
        serials = [serial_of(name) for name in _names(self._open) if _NAME.fullmatch(name)]
        document = krl(self._config.authorities, serials, time.time_ns(), int(time.time()))
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes()[_HEAD_BYTES:] == document[_HEAD_BYTES:]:
                return
        _write(path, document)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._config.state / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically and durably. With a truncated KRL, sshd would refuse every login."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _sync(folder: Path) -> None:
    """Make renames and deletions in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- processes --------------------------------------------------------------------------------------------------------


class Session:
    """The server's process for one connection: its pid, and its start time, which tells it from a later process of
    the same pid.
    """

    def __init__(self, pid: int, started: int, boot: str) -> None:
        self.pid, self.started, self.boot = pid, started, boot

    def __str__(self) -> str:
        return f"{self.pid}.{self.started}.{self.boot}"

    @classmethod
    def of(cls, pid: int) -> Session:
        """Return the session of a running process. Raises FailedError if there is none."""
        process = _process(pid)
        if process is None:
            raise FailedError(f"no process {pid}")
        return cls(pid, process[1], _boot())

    @classmethod
    def parse(cls, text: str) -> Session:
        pid, started, boot = text.split(".")
        return cls(int(pid), int(started), boot)

    def lives(self) -> bool:
        return self.boot == _boot() and _is(self.pid, self.started)


def end_all(sessions: Iterable[Session]) -> None:
    """Kill connections with all their processes. Returns once they are gone. Raises FailedError."""
    signalled: dict[int, int] = {}
    for session in sessions:
        if session.lives():
            signalled.update(_stopped(session))
    for pid, started in signalled.items():
        _signal(pid, started, signal.SIGKILL)
    until = time.monotonic() + _END_WITHIN_S
    delay_s = 0.001
    while running := [pid for pid, started in signalled.items() if _is(pid, started)]:
        if time.monotonic() > until:
            raise FailedError(f"processes {running} do not end")
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, 0.05)


def end_users(users: Iterable[str]) -> None:
    """Kill all processes of these users. Returns once they are gone. Raises FailedError."""
    try:
        numbers = {pwd.getpwnam(user).pw_uid for user in users}
    except KeyError as error:
        raise FailedError(f"there is no such user: {error}") from None
    if 0 in numbers:
        raise FailedError("root is no user for agents only")
    until = time.monotonic() + _END_WITHIN_S
    while running := [pid for pid in _pids() if _owner(pid) in numbers and _process(pid)]:
        if time.monotonic() > until:
            raise FailedError(f"processes {running} do not end")
        for pid in running:  # until there are none: a running one may start others meanwhile
            if (process := _process(pid)) is not None and _owner(pid) in numbers:
                _signal(pid, process[1], signal.SIGKILL)
        time.sleep(0.002)


def _owner(pid: int) -> int | None:
    """Return the real user id of a process, or None. Its folder in /proc may be root's nevertheless."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            if line.startswith(b"Uid:"):
                return int(line.split()[1])
    return None


def _stopped(session: Session) -> dict[int, int]:
    """Stop all processes of a connection and return them. A stopped process cannot start others during the search."""
    stopped: dict[int, int] = {}
    while True:
        new = {pid: started for pid, started in _tree(session).items() if pid not in stopped}
        if not new:
            return stopped
        for pid, started in new.items():
            _signal(pid, started, signal.SIGSTOP)
        stopped.update(new)


def _tree(session: Session) -> dict[int, int]:
    """Return the process, its descendants, and all others in the scope that systemd gave to its session."""
    processes = {pid: process for pid in _pids() if (process := _process(pid)) is not None}
    queue = [session.pid, *_scope(session.pid)]
    tree: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    while queue:
        pid = queue.pop()
        if pid in processes and pid not in tree:
            tree[pid] = processes[pid][1]
            queue += children.get(pid, [])
    return tree


def _scope(pid: int) -> list[int]:
    """Return the processes of the scope that pam_systemd gave to a session. Empty without pam_systemd."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"{_PROC}/{pid}/cgroup").read_text().splitlines():
            path = line.partition("::")[2]
            if re.search(r"/session-[^/]+\.scope$", path):
                return [int(word) for word in Path(f"{_CGROUPS}{path}/cgroup.procs").read_text().split()]
    return []


def _pids() -> list[int]:
    return [int(name) for name in _names(Path("/proc")) if name.isdigit()]


def _process(pid: int) -> tuple[int, int] | None:
    """Return parent and start time of a running process, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else (int(fields[1]), int(fields[19]))


def _is(pid: int, started: int) -> bool:
    process = _process(pid)
    return process is not None and process[1] == started


def _signal(pid: int, started: int, what: signal.Signals) -> None:
    """Send a signal to this very process, not to a later one with the same pid."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _is(pid, started):
            signal.pidfd_send_signal(handle, what)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


# --- what it is called for --------------------------------------------------------------------------------------------


def serve(config_path: str) -> None:
    """Answer requests until the input ends."""
    sys.stdout.write(json.dumps({"ringfence": PROTOCOL}) + "\n")
    sys.stdout.flush()
    while line := sys.stdin.readline(_LONGEST_LINE):
        request = json.loads(line)
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            answer["answer"] = _answer(config_path, request)
        except RefusedError as error:
            answer["refused"] = str(error)
        except FailedError as error:
            answer["failed"] = str(error)
        except (OSError, ValueError, KeyError, TypeError) as error:
            answer["failed"] = type(error).__name__
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(config_path: str, request: dict[str, Any]) -> Any:
    config = Config(config_path)  # read each time: the administrator's changes take effect at once
    state, domain = State(config), request["domain"]
    if not _DOMAIN.fullmatch(domain):
        raise ValueError("no trust domain")
    if request["do"] == "standing":
        return state.standing(domain)
    if request["do"] == "rights":
        return {
            "run": [
                sys.executable,
                "-I",
                str(Path(__file__).absolute()),
                "--config",
                str(Path(config_path).absolute()),
                "run",
            ],
            "users": {
                name: {verb: sorted(of.get(verb, ())) for verb in (*COMMAND_VERBS, "may")}
                for name, of in config.users.items()
            },
        }
    name = f"{domain}.{request['lease']}"
    if not _NAME.fullmatch(name):
        raise ValueError("no lease")
    if request["do"] == "undo":
        return state.undo(name)
    if request["do"] == "announce":
        if request["user"] not in config.users:
            raise RefusedError(f"no certificate can be for user {request['user']!a} here")
        return state.announce(name, request["user"], int(request["deadline"]))
    raise ValueError("no such request")


def principals(config: Config, user: str, serial: str, key_id: str, fingerprint: str) -> str:
    """Return the principal that a certificate needs to log in as this user now, or an empty string."""
    if not config.is_authority(fingerprint):
        return ""
    if user == config.broker:
        allowed = serial == "0"  # the authority's own
    else:
        name = key_id[len(KEY_ID) :]
        allowed = (
            key_id.startswith(KEY_ID)
            and _NAME.fullmatch(name) is not None
            and str(serial_of(name)) == serial
            and user in config.users
            and State(config).login(name, user, Session.of(os.getppid()))
        )
    return PRINCIPAL + user if allowed else ""


def chosen(granted: list[str], asked: str) -> list[str] | None:
    """Return verb and name of the command to run: the requested one, or the only one granted.

    None if there is no such.
    """
    commands = [one.split(":") for one in granted]
    if not asked and len(commands) == 1:
        return commands[0]
    return next((one for one in commands if " ".join(one) == asked), None)


def run(config: Config, user: str, granted: list[str]) -> None:
    """Replace this process by the requested command. Raises FailedError, RefusedError."""
    command = chosen(granted, os.environ.pop("SSH_ORIGINAL_COMMAND", ""))
    if command is None:
        may = ", ".join(one.replace(":", " ") for one in granted) or "nothing"
        raise RefusedError(f"this credential runs: {may}")
    verb, name = command
    argv = config.users.get(user, {}).get(verb, {}).get(name)
    if argv is None:
        raise FailedError(f"there is no command {verb} {name} any more")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores, and what it starts with it
    try:
        os.execv(argv[0], argv)  # noqa: S606 - without a shell, on purpose
    except OSError as error:
        raise FailedError(f"cannot run {argv[0]}: {error.strerror}") from None


def main(args: list[str]) -> int:
    """Entry point for sshd, Ringfence and the administrator. Returns the exit status."""
    path, args = (args[1], args[2:]) if args[:1] == ["--config"] else (CONFIG, args)
    try:
        if args == ["init"]:
            State(Config(path)).make()
        elif args == ["serve"]:
            serve(path)
        elif args[:1] == ["principals"] and len(args) == 5:
            sys.stdout.write(principals(Config(path), *args[1:]) + "\n")
        elif args[:1] == ["run"] and len(args) > 1:
            run(Config(path), args[1], args[2:])
        else:
            sys.stderr.write(__doc__ or "")
            return 2
    except RefusedError as error:
        sys.stderr.write(f"refused: {error}\n")
        return 126
    except (FailedError, OSError) as error:
        sys.stderr.write(f"ringfence-ssh-helper: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
