"""What every backend provides, and what it refuses: one suite, run at each place."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runner.places import CallError, Runner

DAEMON = """
import os, socket, sys, time
def report(name):
    peer = socket.socket(socket.AF_UNIX)
    peer.connect("/run/ringfence/gateway.sock")
    peer.sendall(name.encode())
    return peer
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        held = report("daemon")
        while True:
            time.sleep(60)
    os._exit(0)
held = report("command")
if sys.argv[1] == "stay":
    while True:
        time.sleep(60)
held.recv(1)
"""


class Listener:
    """A socket like the gateway's. Each connection says its name; its end is seen as the end of its process."""

    def __init__(self, path: Path, uid: int) -> None:
        self.path = path
        self._uid = uid
        self.peers: dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self._arrived = asyncio.Condition()

    async def __aenter__(self) -> Listener:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        os.chown(self.path, self._uid, self._uid)
        self.path.chmod(0o666)  # the user of a container is nobody outside
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for _, writer in self.peers.values():
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = (await reader.read(64)).decode()
        async with self._arrived:
            self.peers[name] = (reader, writer)
            self._arrived.notify_all()

    async def named(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with self._arrived:
            await self._arrived.wait_for(lambda: name in self.peers)
        return self.peers[name]


async def test_exit_code_arguments_and_streams_are_the_commands(runner: Runner) -> None:
    ended = await runner.run(
        "sh", "-c", 'cat; echo "$0|$1" >&2; exit 7', "name with spaces", "a\nb", stdin="given\n"
    )
    assert (ended.code, ended.reason) == (7, "command")
    assert ended.stdout == "given\n"
    assert ended.stderr == "name with spaces|a\nb\n"


async def test_a_signal_that_ends_the_command_is_reported_as_a_shell_does(runner: Runner) -> None:
    ended = await runner.run("sh", "-c", "kill -TERM $$")
    assert ended.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("argv", "status"), [(["/no/such/program"], 127), (["/etc/passwd"], 126)])
async def test_a_command_that_cannot_be_run_ends_as_in_a_shell(
    runner: Runner, argv: list[str], status: int
) -> None:
    ended = await runner.run(*argv)
    # The init of a container engine tells no reason.
    assert ended.code == status if runner.place.backend == "bubblewrap" else ended.code != 0


async def test_the_command_has_no_other_environment_than_what_was_given(runner: Runner) -> None:
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    ended = await runner.python(program, environment={"GIVEN": "yes = 'this'", "PATH": "/usr/bin:/bin"})
    environment = json.loads(ended.stdout)
    assert environment.pop("GIVEN") == "yes = 'this'"
    assert environment.pop("PATH") == "/usr/bin:/bin"
    assert environment.pop("HOME") == "/home/agent"
    environment.pop("LC_CTYPE", None)  # Python sets it
    assert set(environment) <= {"LANG", "USER", "TMPDIR", "HOSTNAME", "PWD", "TERM", "container"}


async def test_the_command_starts_where_it_was_told(runner: Runner) -> None:
    assert (await runner.run("pwd", working_directory="/tmp")).stdout == "/tmp\n"
    assert (await runner.run("pwd")).stdout == "/home/agent\n"
    if runner.place.backend == "oci":
        return  # engines make the directory, or refuse the container
    nowhere = await runner.run("pwd", working_directory="/no/such/folder")
    assert (nowhere.code, nowhere.stdout) == (126, "")
    assert "/no/such/folder" in nowhere.stderr


@pytest.mark.parametrize("root_inside", [False, True])
async def test_the_command_has_no_privileges(runner: Runner, root_inside: bool) -> None:
    ended = await runner.run("cat", "/proc/self/status", "/proc/self/limits", root_inside=root_inside)
    fields = dict(line.split(":\t", 1) for line in ended.stdout.splitlines() if ":\t" in line)
    assert {name: int(fields[name], 16) for name in fields if name.startswith("Cap")} == {
        "CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0}  # fmt: skip
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert fields["Uid"].split()[0] == ("0" if root_inside else "1000")
    assert not int(fields["Groups"].split()[0]) if root_inside and fields["Groups"].split() else True
    core = next(line for line in ended.stdout.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["1", "1"]


async def test_processes_run_as_nobody_who_owns_something_outside(runner: Runner) -> None:
    spec = runner.spec("sleep", "600")
    pid = (await runner.call("start", spec=spec))["pid"]
    uid = Path(f"/proc/{pid}").stat().st_uid
    status = Path(f"/proc/{pid}/status").read_text()
    await runner.call("destroy", run_id=spec["run_id"])
    if runner.place.root:
        assert uid not in (0, 65534), status
    else:
        assert uid == runner.place.uid


async def test_namespaces_are_its_own(runner: Runner) -> None:
    program = "import os; print({kind: os.readlink(f'/proc/self/ns/{kind}') for kind in os.listdir('/proc/self/ns')})"
    inside = eval((await runner.python(program)).stdout)
    kinds = ["user", "ipc", "pid", "net", "uts", "mnt"]
    if runner.place.backend == "bubblewrap":
        kinds.append("cgroup")  # Podman makes none with control groups of version 1
    for kind in kinds:
        assert inside[kind] != os.readlink(f"/proc/self/ns/{kind}"), kind  # noqa: PTH115


async def test_the_network_has_nothing_but_loopback(runner: Runner) -> None:
    program = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
print([name for _, name in socket.if_nameindex()] if False else open("/proc/net/dev").read().count(":"))
print(socket.gethostname())
"""
    ended = await runner.python(program)
    assert ended.stdout.split() == ["1", "sandbox"], ended.stderr


async def test_the_given_socket_is_the_way_out(runner: Runner, folder: Path) -> None:
    async with Listener(folder / "s.sock", runner.place.uid) as listener:
        spec = runner.spec("python3", "-c", DAEMON, "stay", socket=str(listener.path))
        await runner.call("start", spec=spec)
        await listener.named("command")
        await runner.call("destroy", run_id=spec["run_id"])


async def test_system_directories_are_read_only_and_etc_is_made(runner: Runner) -> None:
    program = """
import os
def can_write(folder):
    try:
        os.close(os.open(folder + "/written", os.O_CREAT | os.O_WRONLY))
    except OSError:
        return False
    return True
folders = ["/", "/usr", "/usr/bin", "/usr/lib", "/etc", "/dev", "/run", "/var", "/proc", "/home"]
folders += ["/tmp", "/home/agent", "/dev/shm"]
print([folder for folder in folders if can_write(folder)])
print(os.path.exists("/etc/shadow") or os.path.exists("/etc/ssh"))
"""
    for root_inside in (False, True):
        writable = ["/tmp", "/home/agent", "/dev/shm"]
        if root_inside and runner.place.backend == "oci":
            writable = ["/dev", "/run", *writable]  # memory too, and bounded
        ended = await runner.python(program, root_inside=root_inside)
        assert ended.stdout.splitlines() == [
            str(writable),
            "False",
        ], ended.stderr
    if runner.place.backend == "bubblewrap":
        users = (await runner.run("cat", "/etc/passwd")).stdout.splitlines()
        assert [line.split(":")[0] for line in users] == ["root", "agent", "nobody"]


async def test_files_given_are_there_and_read_only(runner: Runner) -> None:
    ended = await runner.run(
        "sh", "-c", "cat /etc/ringfence/ca.pem; echo x >> /etc/ringfence/ca.pem; test $? != 0",
        files={"/etc/ringfence/ca.pem": "a certificate\n"},
    )  # fmt: skip
    assert (ended.code, ended.stdout) == (0, "a certificate\n")


async def test_mounts_are_readable_or_writable_as_asked(runner: Runner) -> None:
    read, write = runner.own_folder("read"), runner.own_folder("write")
    (read / "file").write_text("read me")
    single = runner.folder / "single"
    single.write_text("alone")
    script = """
        cat /mnt/read/file /mnt/single
        ! echo x > /mnt/read/new || exit 1
        test "$1" = oci && exit
        mkdir /mnt/write/made && echo done > /mnt/write/made/file && chmod 600 /mnt/write/made/file || exit 2
    """
    mounts = [
        [str(read), "/mnt/read", False],
        [str(write), "/mnt/write", runner.place.backend != "oci"],
        [str(single), "/mnt/single", False],
    ]
    ended = await runner.run("sh", "-c", script, "sh", runner.place.backend, mounts=mounts)
    assert (ended.code, ended.stdout) == (0, "read mealone"), ended.stderr
    assert list(read.iterdir()) == [read / "file"]
    if runner.place.backend == "oci":
        return
    made = write / "made" / "file"
    assert made.read_text() == "done\n"
    # What the command writes belongs to whom the folder belongs to.
    assert made.stat().st_uid == runner.place.uid


SET_ID = """
import ctypes, os, shutil, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
os.chdir(sys.argv[1])
os.umask(0)
shutil.copy("/bin/sh", "shell")
shell = os.open("shell", os.O_RDONLY)
here = os.open(".", os.O_RDONLY)
how = (ctypes.c_uint64 * 3)(os.O_CREAT | os.O_RDWR, 0o4755, 0)
listener = socket.socket(socket.AF_UNIX)
def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def tmpfile():
    made = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o4755)
    os.link(f"/proc/self/fd/{made}", "by-tmpfile", follow_symlinks=True)
ways = {
    "chmod": lambda: os.chmod("shell", 0o6755),
    "chmod-group": lambda: os.chmod("shell", 0o2755),
    "chmod-folder": lambda: os.chmod(".", 0o2777),
    "fchmod": lambda: os.fchmod(shell, 0o4755),
    "fchmodat": lambda: os.chmod("shell", 0o4755, dir_fd=here),
    "fchmodat2": lambda: call(452, here, b"shell", 0o4755, 0),
    "by-proc": lambda: os.chmod(f"/proc/self/fd/{shell}", 0o4755),
    "open": lambda: os.open("by-open", os.O_CREAT | os.O_RDWR, 0o4755),
    "tmpfile": tmpfile,
    "openat2": lambda: call(437, here, b"by-openat2", how, 24),
    "mknod": lambda: os.mknod("by-mknod", 0o104755),
    "mkdir": lambda: os.mkdir("by-mkdir", 0o2777),
    "fifo": lambda: os.mkfifo("by-mkfifo", 0o4755),
    "socket": lambda: (os.fchmod(listener.fileno(), 0o4755), listener.bind("by-bind")),
}
for name, way in ways.items():
    try:
        way()
        print("done:", name)
    except OSError as error:
        pass
os.chmod("shell", 0o755)
os.mkdir("usual")
os.close(os.open("usual/file", os.O_CREAT | os.O_EXCL, 0o666))
"""


@pytest.mark.parametrize("root_inside", [False, True])
async def test_no_file_outside_gets_a_set_id_bit(runner: Runner, root_inside: bool) -> None:
    if runner.place.backend == "oci":
        pytest.skip("containers have no writable mounts")
    folder = runner.own_folder("write")
    mounts = [[str(folder), "/mnt/m", True]]
    ended = await runner.python(SET_ID, "/mnt/m", mounts=mounts, root_inside=root_inside)
    assert (ended.code, ended.stdout) == (0, ""), ended.stderr
    for path in (folder, *folder.rglob("*")):
        assert not path.lstat().st_mode & 0o6000, path
    assert (folder / "shell").stat().st_mode & 0o777 == 0o755
    assert (folder / "usual/file").is_file()


async def test_a_link_in_a_mount_leads_nowhere(runner: Runner) -> None:
    secret = runner.folder / "secret"
    secret.write_text("canary")
    folder = runner.own_folder("mounted")
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to("../secret")
    ended = await runner.run("sh", "-c", "cat /mnt/m/link /mnt/m/up", mounts=[[str(folder), "/mnt/m", False]])
    assert ended.code != 0
    assert "canary" not in ended.stdout


async def test_a_mount_through_a_link_is_refused(runner: Runner) -> None:
    folder = runner.own_folder("real")
    (runner.folder / "link").symlink_to(folder)
    with pytest.raises(CallError, match="symbolic link") as refused:
        await runner.run("true", mounts=[[str(runner.folder / "link"), "/mnt/m", False]])
    assert refused.value.code == "sandbox_spec_invalid"
    assert str(folder) in (refused.value.remedy or "")


@pytest.mark.parametrize(
    "host", ["/", "/proc", "/proc/self", "/run", "/dev/null", "/sys", "relative", "/tmp/../etc"]
)
async def test_mounts_that_lead_out_are_refused(runner: Runner, host: str) -> None:
    with pytest.raises(CallError, match="sandbox_spec_invalid"):
        await runner.run("true", mounts=[[host, "/mnt/m", False]])


@pytest.mark.parametrize(
    "inside", ["/", "/etc", "/usr/bin", "/proc/1", "/home/agent", "/tmp", "/mnt/../etc", "mnt"]
)
async def test_mounts_over_what_is_taken_are_refused(runner: Runner, inside: str) -> None:
    folder = runner.own_folder("m")
    with pytest.raises(CallError, match="sandbox_spec_invalid"):
        await runner.run("true", mounts=[[str(folder), inside, False]])


async def test_a_file_as_the_socket_is_refused(runner: Runner) -> None:
    (runner.folder / "file").touch()
    with pytest.raises(CallError, match="not a unix socket"):
        await runner.run("true", socket=str(runner.folder / "file"))


async def test_a_socket_as_a_mount_is_refused(runner: Runner) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(runner.folder / "agent.sock"))
    with server, pytest.raises(CallError, match="neither a directory nor a file"):
        await runner.run("true", mounts=[[str(runner.folder / "agent.sock"), "/mnt/s", False]])


def _listening(path: Path) -> None:
    """Bind by a relative path and rename: the kernel has no name by which the socket is found."""
    with socket.socket(socket.AF_UNIX) as server:
        folder = Path.cwd()
        os.chdir(path.parent)
        try:
            server.bind("elsewhere")
        finally:
            os.chdir(folder)
    (path.parent / "elsewhere").rename(path)


def _bound(path: Path, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as server:
        server.bind(str(path))


ENDPOINTS: dict[str, Callable[[Path], object]] = {
    "a socket without a path in the kernel": _listening,
    "a datagram socket": lambda path: _bound(path, socket.SOCK_DGRAM),
    "a socket of packets": lambda path: _bound(path, socket.SOCK_SEQPACKET),
    "a named pipe": os.mkfifo,
}


@pytest.mark.parametrize("make", ENDPOINTS.values(), ids=ENDPOINTS.keys())
async def test_a_folder_with_a_socket_or_pipe_is_refused_unless_hidden(
    runner: Runner, make: Callable[[Path], object]
) -> None:
    folder = runner.own_folder("m")
    deep = runner.own_folder("m/a/b")
    (folder / "a/beside").write_text("beside")
    make(deep / "one")
    with pytest.raises(CallError, match=r"a/b/one is a socket or a named pipe") as refused:
        await runner.run("true", mounts=[[str(folder), "/mnt/m", False]])
    assert "--hide" in (refused.value.remedy or "")
    script = "cd /mnt/m && cat a/beside a/b/one && test ! -S a/b/one -a ! -p a/b/one && echo a/b/*"
    for writable in (False, runner.place.backend != "oci"):
        ended = await runner.run("sh", "-c", script, mounts=[[str(folder), "/mnt/m", writable, "a/b/one"]])
        assert (ended.code, ended.stdout) == (0, "besidea/b/one\n"), ended.stderr
        script_of_folder = "cd /mnt/m/a/b && for one in * .*; do test ! -e $one || echo $one; done"
        ended = await runner.run(
            "sh", "-c", script_of_folder, mounts=[[str(folder), "/mnt/m", writable, "a/b"]]
        )
        assert (ended.code, set(ended.stdout.split()) - {".", ".."}) == (0, set()), ended.stderr
    (deep / "one").unlink()
    assert (await runner.run("true", mounts=[[str(folder), "/mnt/m", False]])).code == 0


async def test_hidden_path_stays_hidden_in_a_writable_mount(runner: Runner) -> None:
    if runner.place.backend == "oci":
        pytest.skip("containers have no writable mounts")
    folder, deep = runner.own_folder("m"), runner.own_folder("m/a")
    (deep / "one").write_text("canary")
    (deep / "one").chmod(0o644)
    os.chown(deep / "one", runner.place.uid, runner.place.uid)
    script = """
        cd /mnt/m; cat a/one; rm -f a/one; mv a/one a/two; ln a/one a/three; mv a b; cat b/one b/two b/three; true
    """
    ended = await runner.run("sh", "-c", script, mounts=[[str(folder), "/mnt/m", True, "a/one"]])
    assert "canary" not in ended.stdout
    assert (folder / "b/one").read_text() == "canary"


async def test_a_hidden_path_through_a_link_is_refused(runner: Runner) -> None:
    folder, _ = runner.own_folder("m"), runner.own_folder("m/a")
    (folder / "link").symlink_to("a")
    for path in ("link", "link/x", "../x", "gone", ".", "/etc"):
        with pytest.raises(CallError, match="sandbox_spec_invalid"):
            await runner.run("true", mounts=[[str(folder), "/mnt/m", False, path]])


async def test_a_folder_that_cannot_be_listed_is_refused(runner: Runner) -> None:
    if runner.place.root:
        pytest.skip("root lists every folder")
    folder, closed = runner.own_folder("m"), runner.own_folder("m/closed")
    closed.chmod(0o311)
    with pytest.raises(CallError, match="closed cannot be listed"):
        await runner.run("true", mounts=[[str(folder), "/mnt/m", False]])
    assert (await runner.run("true", mounts=[[str(folder), "/mnt/m", False, "closed"]])).code == 0


async def test_the_runners_records_are_never_mounted(runner: Runner) -> None:
    for folder in (runner.state.parent, runner.state):
        with pytest.raises(CallError, match="records"):
            await runner.run("true", mounts=[[str(folder), "/mnt/m", False]])


async def test_signals_reach_the_commands_whole_group(runner: Runner, folder: Path) -> None:
    script = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9));" + DAEMON
    async with Listener(folder / "s.sock", runner.place.uid) as listener:
        spec = runner.spec("python3", "-c", script, "stay", socket=str(listener.path))
        await runner.call("start", spec=spec)
        await listener.named("command")
        await runner.call("signal", run_id=spec["run_id"], number=signal.SIGTERM)
        assert (await runner.call("wait", run_id=spec["run_id"]))["code"] == 9
        await runner.call("destroy", run_id=spec["run_id"])


async def test_processes_of_a_command_end_with_it(runner: Runner, folder: Path) -> None:
    async with Listener(folder / "s.sock", runner.place.uid) as listener:
        spec = runner.spec("python3", "-c", DAEMON, "end", socket=str(listener.path))
        await runner.call("start", spec=spec)
        (reader, _), (_, command_writer) = await listener.named("daemon"), await listener.named("command")
        command_writer.write(b"x")
        assert (await runner.call("wait", run_id=spec["run_id"]))["code"] == 0
        assert await reader.read() == b""  # the daemon is dead
        assert (await runner.call("destroy", run_id=spec["run_id"]))["complete"]


async def test_destroying_ends_daemons_and_may_be_repeated(runner: Runner, folder: Path) -> None:
    async with Listener(folder / "s.sock", runner.place.uid) as listener:
        spec = runner.spec("python3", "-c", DAEMON, "stay", socket=str(listener.path))
        await runner.call("start", spec=spec)
        (daemon, _), (command, _) = await listener.named("daemon"), await listener.named("command")
        first = await runner.call("destroy", run_id=spec["run_id"])
        assert first["complete"], first
        assert (await daemon.read(), await command.read()) == (b"", b"")
        assert await runner.call("destroy", run_id=spec["run_id"]) == first
        assert (await runner.call("wait", run_id=spec["run_id"]))["reason"] == "killed"
        assert not list(runner.state.iterdir())


async def test_a_frozen_sandbox_does_nothing_until_it_is_thawed(runner: Runner, folder: Path) -> None:
    program = """
import os, socket
peer = socket.socket(socket.AF_UNIX)
peer.connect("/run/ringfence/gateway.sock")
peer.sendall(b"command")
while question := peer.recv(1):
    peer.sendall(question)
"""
    async with Listener(folder / "s.sock", runner.place.uid) as listener:
        spec = runner.spec("python3", "-c", program, socket=str(listener.path))
        await runner.call("start", spec=spec)
        reader, writer = await listener.named("command")
        writer.write(b"1")
        assert await reader.read(1) == b"1"
        await runner.call("freeze", run_id=spec["run_id"])
        writer.write(b"2")
        answer = asyncio.create_task(reader.read(1))
        done, _ = await asyncio.wait([answer], timeout=0.3)
        assert not done
        await runner.call("thaw", run_id=spec["run_id"])
        assert await answer == b"2"
        # A frozen sandbox can be destroyed.
        await runner.call("freeze", run_id=spec["run_id"])
        assert (await runner.call("destroy", run_id=spec["run_id"]))["complete"]


async def test_the_ttl_ends_it(runner: Runner) -> None:
    ended = await runner.run("sleep", "600", limits={"ttl_s": 0.5})
    assert (ended.code, ended.reason) == (137, "ttl")


async def test_processes_are_limited(runner: Runner) -> None:
    program = """
import os, time
count = 0
try:
    while count < 200:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError:
    pass
print(count)
"""
    for root_inside in (False, True):
        ended = await runner.python(program, limits={"pids": 20}, root_inside=root_inside)
        assert 10 <= int(ended.stdout) <= 20, ended.stderr


async def test_memory_is_limited_or_the_run_refused(runner: Runner) -> None:
    fill = """
import mmap
memory = mmap.mmap(-1, 256 << 20)
for page in range(0, len(memory), 4096):
    memory[page] = 1
print("all")
"""
    if runner.place.root:
        ended = await runner.python(fill, limits={"memory_bytes": 64 << 20})
        assert ended.code != 0
        assert ended.stdout == ""
        assert (await runner.python(fill)).stdout == "all\n"
    else:
        with pytest.raises(CallError, match="memory") as refused:
            await runner.python(fill, limits={"memory_bytes": 64 << 20})
        assert refused.value.code == "sandbox_unavailable"
        assert refused.value.remedy


async def test_processor_time_is_limited_or_the_run_refused(runner: Runner) -> None:
    spec = runner.spec("sleep", "600", limits={"cpus": 0.5})
    if not runner.place.root:
        with pytest.raises(CallError, match="limit of cpu") as refused:
            await runner.call("start", spec=spec)
        assert refused.value.remedy
        return
    pid = (await runner.call("start", spec=spec))["pid"]
    quotas = []
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = Path("/sys/fs/cgroup") / controllers / path.lstrip("/")
        quotas += [(folder / "cpu.cfs_quota_us", "50000"), (folder / "cpu.max", "50000 100000")]
    found = [file.read_text().strip() == expected for file, expected in quotas if file.exists()]
    await runner.call("destroy", run_id=spec["run_id"])
    assert found == [True]


async def test_the_report_says_what_was_used(runner: Runner) -> None:
    spec = runner.spec("sh", "-c", "cat /usr/bin/* > /dev/null")
    await runner.call("start", spec=spec)
    await runner.call("wait", run_id=spec["run_id"])
    usage = (await runner.call("destroy", run_id=spec["run_id"]))["usage"]
    if runner.place.name == "bubblewrap-root":
        assert usage["cpu_s"] > 0
        assert usage["memory_peak_bytes"] > 0
        assert usage["memory_kills"] == 0
    else:
        assert usage == {"cpu_s": None, "memory_peak_bytes": None, "memory_kills": None}


async def test_writable_storage_is_memory_and_bounded(runner: Runner) -> None:
    program = """
import os, sys
for folder in ("/tmp", "/home/agent", "/dev/shm", "/var/tmp"):
    written = 0
    try:
        with open(folder + "/big", "wb") as file:
            while written < 64:
                written += bool(file.write(bytes(1 << 20)))
                file.flush()
    except OSError as error:
        pass
    print(folder, written)
    try:
        os.unlink(folder + "/big")
    except OSError:
        pass
"""
    ended = await runner.python(program, tmp_bytes=4 << 20, home_bytes=4 << 20, shm_bytes=4 << 20)
    sizes = dict(line.split() for line in ended.stdout.splitlines())
    assert set(sizes) == {"/tmp", "/home/agent", "/dev/shm", "/var/tmp"}, ended.stderr
    assert all(3 <= int(size) <= 5 for size in sizes.values()), sizes


async def test_no_descriptor_is_inherited(runner: Runner) -> None:
    program = "import os; print(sorted(os.listdir('/proc/self/fd')), sorted(os.listdir('/proc/1/fd')))"
    ended = await runner.python(program)
    command, init = eval("(" + ended.stdout.replace("] [", "], [") + ")")
    assert set(command) == {"0", "1", "2", "3"}  # 3 is the listing
    assert len(init) <= 4


async def test_a_run_id_is_used_once_at_a_time(runner: Runner) -> None:
    spec = runner.spec("sleep", "600")
    await runner.call("start", spec=spec)
    with pytest.raises(CallError, match="exists already"):
        await runner.call("start", spec=spec)
    await runner.call("destroy", run_id=spec["run_id"])
    assert (await runner.run("true", run_id=spec["run_id"])).code == 0


async def test_a_directory_as_a_stream_is_refused() -> None:
    from ringfence.runner.sandbox.backend import SandboxSpecError, Streams, check_streams

    descriptor = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(SandboxSpecError, match="stdin is a directory"):
            check_streams(Streams(stdin=descriptor))
    finally:
        os.close(descriptor)


async def test_the_control_socket_stands_inside_with_a_folder_for_the_instance(runner: Runner) -> None:
    """The folder of the socket is closed to everybody but the runner."""
    private = runner.own_folder("private")
    private.chmod(0o700)
    program = """
import os, socket, stat
peer = socket.socket(socket.AF_UNIX)
peer.connect("/run/ringfence/control.sock")
folder = "/run/ringfence/instance"
found = os.stat(folder)
kind = next(line.split()[2] for line in open("/proc/mounts") if line.split()[1] == folder)
open(f"{folder}/made", "x").close()
peer.sendall(f"{stat.S_IMODE(found.st_mode):o} {found.st_uid == os.getuid()} {kind}".encode())
"""
    async with Listener(private / "c.sock", runner.place.uid) as listener:
        ended = await runner.python(program, control=str(listener.path))
    assert ended.code == 0, ended.stderr
    assert [*listener.peers] == ["700 True tmpfs"]


async def test_without_a_control_socket_there_is_no_folder_for_an_instance(runner: Runner) -> None:
    assert (await runner.run("ls", "/run/ringfence")).code != 0


async def test_names_lead_to_loopback_addresses(runner: Runner) -> None:
    program = "import socket; print(socket.gethostbyname('db.example'), socket.gethostbyname('localhost'))"
    ended = await runner.python(program, hosts={"db.example": "127.0.1.7"})
    assert ended.stdout == "127.0.1.7 127.0.0.1\n", ended.stderr


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("db.example", "10.0.0.1"),
        ("db.example", "127.0.0.1\n10.0.0.1 other"),
        ("db.example 127.0.0.1", "127.0.0.1"),
        ("db\n10.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.1.1"),
        ("10.0.0.1", "127.0.1.1"),
    ],
)
async def test_no_other_line_gets_into_the_hosts_file(runner: Runner, name: str, address: str) -> None:
    with pytest.raises(CallError) as refused:
        await runner.call("start", spec=runner.spec("true", hosts={name: address}))
    assert refused.value.code == "sandbox_spec_invalid"


# A container runs before its network is set up. What runs there in earnest is init, which is told when to listen.
OWN_ADDRESSES = """
import errno, socket, time
for family, address in ((socket.AF_INET, "203.0.113.7"), (socket.AF_INET6, "2001:db8::7")):
    listener = socket.socket(family)
    deadline = time.monotonic() + 30
    while True:
        try:
            listener.bind((address, 5432))
            break
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    listener.listen()
    socket.create_connection((address, 5432), 5).close()
    try:
        socket.create_connection((address[:-1] + "8", 5432), 5)
    except OSError as error:
        print(error.errno)
"""


async def test_addresses_of_the_sandbox_are_inside_and_lead_nowhere_else(runner: Runner) -> None:
    ended = await runner.python(OWN_ADDRESSES, addresses=["203.0.113.7", "2001:db8::7"])
    assert ended.stdout.split() == [str(errno.ENETUNREACH)] * 2, ended.stderr
    outside = socket.socket(socket.AF_INET)
    with pytest.raises(OSError, match="assign"):
        outside.bind(("203.0.113.7", 0))
    outside.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "fe80::1", "10.1", "name", "2001:DB8::7"])
async def test_address_of_no_machine_is_refused(runner: Runner, address: str) -> None:
    with pytest.raises(CallError, match="no IP address"):
        await runner.run("true", addresses=[address])


LOW_PORT = """
import socket
listener = socket.socket()
try:
    listener.bind(("127.0.1.7", 22))
    print("listens")
except PermissionError:
    print("refused")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")))
"""


async def test_low_ports_are_open_where_asked_without_a_capability(runner: Runner) -> None:
    before = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()
    ended = await runner.python(LOW_PORT, low_ports=True)
    assert ended.stdout.split() == ["listens", "0" * 16], ended.stderr
    assert Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text() == before
    if runner.place.backend == "bubblewrap":  # engines open them by themselves
        assert (await runner.python(LOW_PORT)).stdout.split() == ["refused", "0" * 16]
