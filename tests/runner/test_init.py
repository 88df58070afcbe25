"""Init in a real sandbox: the command, its end, its streams, and what it has."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import load
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey, public_key
from ringfence.messages.enrolment import InstanceEnrol
from ringfence.runner.control.channel import CommandStartError
from ringfence.runner.control.messages import EnrolMessage, relays_of
from ringfence.runner.init.instance import InstanceKey, sign_enrolment
from ringfence.runner.sandbox.processes import descendants
from tests.runner.run_host import AGENT, CA_PEM, ENROLMENT, TASK, TRUST_DOMAIN, RunHost, run_host


@pytest.fixture
async def host() -> AsyncIterator[RunHost]:
    async with run_host() as host:
        yield host


async def test_the_exit_code_and_the_streams_are_the_commands(host: RunHost) -> None:
    data = os.urandom(3_000_000)
    ended = await host.run("sh", "-c", "cat; echo done >&2; exit 7", stdin=data)
    assert (ended.code, ended.stderr) == (7, b"done\n")
    assert ended.stdout == data
    assert ended.report is not None
    assert ended.report.exit_code == 7


async def test_arguments_and_variables_may_be_any_bytes(host: RunHost) -> None:
    strange = os.fsdecode(b"\xff\xfe 'x'\n\xc3\xa4")
    program = "import os, sys; print(ascii(os.fsencode(sys.argv[1])), ascii(os.environb[b'GIVEN']))"
    ended = await host.python(program, strange, environment={"GIVEN": strange})
    assert ended.text == f"{os.fsencode(strange)!r} {os.fsencode(strange)!r}\n"


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["/no/such/program"], 127), (["no-such-program"], 127), (["/etc/passwd"], 126), (["/usr"], 126)],
)
async def test_a_command_that_cannot_be_run_is_reported_as_a_shell_does(
    host: RunHost, argv: list[str], code: int
) -> None:
    with pytest.raises(CommandStartError) as refused:
        await host.start(*argv)
    assert refused.value.exit_code == code
    assert argv[0] in refused.value.message


async def test_a_working_directory_that_is_not_there_is_reported(host: RunHost) -> None:
    with pytest.raises(CommandStartError, match="/no/such/folder") as refused:
        await host.start("true", working_directory="/no/such/folder")
    assert refused.value.exit_code == 126


async def test_a_command_that_a_signal_ends_is_reported_as_a_shell_does(host: RunHost) -> None:
    ended = await host.run("sh", "-c", "kill -TERM $$")
    assert ended.code == 128 + signal.SIGTERM


async def test_the_key_of_the_enrolment_is_the_one_in_memory_inside(host: RunHost) -> None:
    run = await host.start(
        *("sh", "-c", 'cat "$RINGFENCE_RUN_INSTANCE/key.json" "$RINGFENCE_RUN_INSTANCE/enrolment.jws"')
    )
    ended = await run.finish()
    decoder = json.JSONDecoder()
    key, end = decoder.raw_decode(ended.text)
    assert ended.text[end:].strip() == ENROLMENT
    assert key["id"] == f"spiffe://{TRUST_DOMAIN}/agent/{AGENT}"
    assert key["jwk"]["x"] == run.key.x
    claims = parse(run.enrolment.decode()).unverified_claims(InstanceEnrol)
    assert (claims.iss, claims.key, claims.token) == (key["id"], run.key, "a token")


def test_saved_instance_key_is_read_by_the_kernel(tmp_path: Path) -> None:
    key = InstanceKey()
    key.save(tmp_path / "key.json", "spiffe://acme.example/agent/bot")
    loaded = SigningKey.load(tmp_path / "key.json")
    assert (loaded.id, loaded.kid) == ("spiffe://acme.example/agent/bot", key.kid)
    assert loaded.public.model_dump(exclude_none=True) == key.jwk
    text = sign_enrolment(key, EnrolMessage("a token", "acme.example", "bot"))
    signed = verify(
        parse(text),
        InstanceEnrol,
        lambda issuer, kid: public_key(loaded.public) if (issuer, kid) == (loaded.id, key.kid) else None,
        audience="acme.example",
        appended_at_ms=time.time_ns() // 1_000_000,
    )
    assert signed.claims.key == loaded.public


# --- what the command has ---

OF_THE_C_LIBRARY = 0b11 << 31
"""The signals 32 and 33, which glibc keeps for itself and ignores in whatever posix_spawn(3) starts."""


async def test_the_command_has_three_descriptors_and_no_privilege(host: RunHost) -> None:
    program = """
import json, os
fields = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn")
open_ones = []
for number in range(1024):
    try:
        os.fstat(number)
        open_ones.append(number)
    except OSError:
        pass
print(json.dumps([open_ones, os.getpgid(0) == os.getpid(), {name: int(fields[name], 16) for name in names}]))
"""
    # A port below 1024 is no reason for a privilege.
    ended = await host.python(program, relays=relays_of([("build.test", 22)]))
    descriptors, leads_group, status = json.loads(ended.text)
    assert descriptors == [0, 1, 2]
    assert leads_group
    # Python ignores SIGPIPE and SIGXFSZ by itself.
    ignored = (1 << (signal.SIGPIPE - 1)) | (1 << (signal.SIGXFSZ - 1))
    assert status.pop("SigIgn") & ~OF_THE_C_LIBRARY == ignored
    assert status == {
        **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "SigBlk"), 0), "NoNewPrivs": 1, "Seccomp": 2,
    }  # fmt: skip


async def test_signals_that_python_ignores_have_their_defaults(host: RunHost) -> None:
    ended = await host.run("sh", "-c", "grep SigIgn /proc/self/status")
    assert int(ended.text.split()[1], 16) & ~OF_THE_C_LIBRARY == 0


async def test_the_environment_is_that_of_the_run_and_nothing_of_outside(
    host: RunHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIDE_SECRET", "seen")
    monkeypatch.setenv("RINGFENCE_KAFKA", "outside:9092")
    ended = await host.run(
        "env", "-0", environment={"GIVEN": "1", "LANG": "C", "NO_PROXY": "own"}, ca_pem=CA_PEM
    )
    variables = dict(line.split("=", 1) for line in ended.text.split("\0") if line)
    proxy = variables.pop("HTTP_PROXY")
    assert proxy.startswith("http://127.0.0.1:")
    assert "ringfence" not in proxy, "no password is needed inside"
    for name in ("http_proxy", "HTTPS_PROXY", "https_proxy"):
        assert variables.pop(name) == proxy
    for name in (
        "SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS",
        "npm_config_cafile", "PIP_CERT",
    ):  # fmt: skip
        assert variables.pop(name) == "/run/ringfence/instance/ca.pem"
    assert "-Djavax.net.ssl.trustStore=/run/ringfence/instance/ca.p12" in variables.pop("JAVA_TOOL_OPTIONS")
    assert variables == {
        "HOME": "/home/agent",
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin:/run/ringfence/instance/bin",
        "LANG": "C",
        "TMPDIR": "/tmp",
        "USER": "agent",
        "GIVEN": "1",
        "NODE_USE_ENV_PROXY": "1",
        "NO_PROXY": "own",
        "no_proxy": "localhost,127.0.0.0/8,127.0.0.1,::1",
        "RINGFENCE_DOOR": "unix:/run/ringfence/gateway.sock",
        "RINGFENCE_RUN_INSTANCE": "/run/ringfence/instance",
        "RINGFENCE_AGENT": AGENT,
        "RINGFENCE_TASK": TASK,
        "RINGFENCE_TRUST_ROOT": "x" * 43,
        "RINGFENCE_TRUST_DOMAIN": TRUST_DOMAIN,
    }


async def test_the_sdk_inside_takes_these_variables_for_its_settings(host: RunHost) -> None:
    ended = await host.run("env", "-0")
    variables = dict(line.split("=", 1) for line in ended.text.split("\0") if line.startswith("RINGFENCE_"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        settings = load(ClientSettings)
    assert (settings.door, settings.agent) == ("unix:/run/ringfence/gateway.sock", AGENT)
    assert settings.run_instance == Path("/run/ringfence/instance")
    assert (settings.trust_root, settings.trust_domain) == ("x" * 43, TRUST_DOMAIN)


ATTEMPTS = """
import os, signal, socket
def attempt(what, action):
    try:
        action()
        print(what, "succeeded")
    except OSError:
        pass
def connect():
    socket.socket(socket.AF_UNIX).connect("/run/ringfence/control.sock")
attempt("control socket", connect)
init = os.getppid()
for name in ("mem", "environ", "maps", "auxv", "stack"):
    attempt(name, lambda: open(f"/proc/{init}/{name}", "rb").read(1))
for name in ("fd", "map_files", "task/%d/fd" % init):
    attempt(name, lambda: os.listdir(f"/proc/{init}/{name}"))
for name in ("cwd", "root", "exe", "fd/5"):
    attempt(name, lambda: os.readlink(f"/proc/{init}/{name}"))
attempt("write memory", lambda: open(f"/proc/{init}/mem", "r+b"))
print(open(f"/proc/{init}/cmdline").read().split("\\0")[0].rpartition("/")[2][:6])
"""


async def test_the_command_cannot_reach_the_runner_or_look_into_init(host: RunHost) -> None:
    ended = await host.python(ATTEMPTS)
    assert ended.text == "python\n", ended


async def test_the_control_socket_is_gone_for_everybody(host: RunHost) -> None:
    run = await host.start("sleep", "600")
    assert not run.channel.path.exists()
    listening = [
        line for line in Path("/proc/net/unix").read_text().splitlines() if str(run.channel.path) in line
    ]
    # The accepted connection has the name still; flag 0x10000 is that of a listener.
    assert not [line for line in listening if int(line.split()[3], 16) & 0x10000]
    await run.close()


# --- signals and ends ---

COUNTS = """
import os, signal, sys
for number in (1, 2, 3, 10, 12, 28):
    signal.signal(number, lambda number, _: os.write(1, b"got %d.\\n" % number))
signal.signal(15, lambda *_: sys.exit(9))
print("ready", flush=True)
while True:
    signal.pause()
"""
EVERY_SIGNAL_ONCE = "ready\ngot 1.\ngot 2.\ngot 3.\ngot 10.\ngot 12.\ngot 28.\n"


async def test_each_signal_reaches_the_command_once(host: RunHost) -> None:
    run = await host.start("/usr/bin/python3", "-c", COUNTS)
    await run.stdout.until(b"ready")
    for number in (1, 2, 3, 10, 12, 28):
        run.sandbox.signal(number)
        await run.stdout.until(f"got {number}.".encode())
    run.sandbox.signal(15)
    ended = await run.finish()
    assert (ended.code, ended.text) == (9, EVERY_SIGNAL_ONCE)


GROUP = """
import os, signal, time
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"parent "))
if os.fork() == 0:
    signal.signal(signal.SIGINT, lambda *_: (os.write(1, b"child "), os._exit(0)))
    os.write(1, b"ready ")
    time.sleep(600)
os.wait()
"""


async def test_a_signal_reaches_the_whole_process_group(host: RunHost) -> None:
    run = await host.start("/usr/bin/python3", "-c", GROUP)
    await run.stdout.until(b"ready")
    run.sandbox.signal(signal.SIGINT)
    ended = await run.finish()
    assert sorted(ended.text.split()) == ["child", "parent", "ready"]


async def test_without_init_everything_ends(host: RunHost) -> None:
    command = "trap 'kill -KILL $PPID' USR1; echo ready; while :; do sleep 0.05; done"
    run = await host.start("sh", "-c", command)
    await run.stdout.until(b"ready")
    run.sandbox.signal(signal.SIGUSR1)
    ended = await run.finish()
    assert (ended.code, ended.report) == (128 + signal.SIGKILL, None)


async def test_a_runner_that_lets_the_channel_go_ends_the_command(host: RunHost) -> None:
    run = await host.start("sleep", "600")
    run.channel.close()
    assert (await run.sandbox.wait()).code == 128 + signal.SIGKILL
    await run.close()


ORPHANS = """
import os, time
init = os.getppid()
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
def zombies():
    found = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found += open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                pass
    return found
while zombies():
    time.sleep(0.01)
reading, writing = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        while os.getppid() not in (1, init):
            time.sleep(0.01)
        os.write(writing, b"i" if os.getppid() == init else b"1")
        os._exit(0)
    os._exit(0)
os.wait()
print("parent of orphans:", os.read(reading, 1).decode())
if os.fork() == 0:
    os.setsid()
    while True:
        time.sleep(60)
print("reaped")
"""


async def test_orphans_are_reaped_and_daemons_end_with_the_command(host: RunHost) -> None:
    ended = await host.python(ORPHANS)
    assert (ended.code, ended.text) == (0, "parent of orphans: i\nreaped\n")


async def test_init_lets_the_streams_go(host: RunHost) -> None:
    """What init has to say of its own would stand among what the command says."""
    if os.geteuid() != 0:
        pytest.skip("not provable here: only root can look into init")
    run = await host.start("sleep", "600")
    init = next(
        process.pid
        for process in descendants(run.sandbox.pid)
        if b"python" in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0]
    )
    streams = [str(Path(f"/proc/{init}/fd/{number}").readlink()) for number in range(3)]
    assert streams == ["/dev/null"] * 3
    await run.close()
