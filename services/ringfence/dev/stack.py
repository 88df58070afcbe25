"""The local stack of `ringfence dev`: broker, Valkey, topics, trust, and each service as a process of its own."""

from __future__ import annotations

import asyncio
import fcntl
import http.client
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ringfence.client.admin.origins import OriginChange, changed_origins, set_origins
from ringfence.client.admin.trust_setup import (
    SERVICE_ROLES,
    TrustFolder,
    add_runners,
    add_services,
    load_root_and_bundle,
    make_trust,
    missing_on_demand_services,
    publish_bundle,
    publish_trust,
)
from ringfence.dev import kafka as embedded_kafka
from ringfence.dev import redis as embedded_redis
from ringfence.dev.kafka import EmbeddedKafka
from ringfence.dev.processes import LOOPBACK, PRIVATE, Child, StackError, claim_port, free_port, spawn
from ringfence.dev.redis import EmbeddedRedis
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import make_private_folder, open_private, write_private
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.api import CONSOLE_PORT, GATEWAY_PORT, PORTS, SIGN_PAGE_PORT
from ringfence.messages.base import PasskeyUse, ServiceRole
from ringfence.messages.trust import Origin

READY_WITHIN_S = 60.0
"""Excludes the time in which a process of the stack waited for a processor (`Patience`)."""
_ANSWER_TIMEOUT_S = 10.0
_SIGN_PAGE = "sign-page"
_GRACE_S = 5.0
"""The time for all services together to shut down. Without a broker none of them can."""


@dataclass
class StackOptions:
    """Options of a stack. Ports of 0 are chosen freely."""

    state: Path
    trust_domain: str = "ringfence.local"
    operator: str = "olga"
    kafka: str | None = None
    """Bootstrap servers of a running broker; None starts the embedded one."""
    embedded_broker: bool = False
    """Whether the broker given as `kafka` is the embedded one."""
    redis_url: str | None = None
    """The URL of a running Redis; None starts the embedded one."""
    topic_prefix: str = "ringfence"
    redis_prefix: str = "rf"
    services: Sequence[ServiceRole] = SERVICE_ROLES
    sign_page: bool = False
    """Serve the page on which people sign with passkeys, at its origin."""
    runner: str | None = None
    """The name of a runner to have a key for, for `ringfence run`. It is no process of the stack."""
    fixed_ports: bool = False
    """Use the services' default ports, so that other programs find them; else free ports."""
    kafka_port: int = 0
    redis_port: int = 0
    resume: bool = False
    """Start with the data that the stack before in this folder left, if it did (`Stack.note`)."""
    partitions: int = 4
    keep_bytes: int = 4 * 1024 * 1024
    """The size limit of each partition that is not compacted, on the embedded broker. The broker holds all data in
    memory, some three times, and writes all of it every other second, on an idle stack too, because of heartbeats.
    """
    environment: dict[str, str] = field(default_factory=dict)
    """Further `RINGFENCE_*` for the services."""


class Stack:
    """Starts everything in order and stops it in reverse. Children die with this process, however it dies."""

    def __init__(self, options: StackOptions, say: Callable[[str], None] = lambda text: None) -> None:
        """`say` receives a line about each step, for people."""
        self.options = options
        self.trust = TrustFolder(options.state)
        self._say = say
        self._broker: EmbeddedKafka | None = None
        self._valkey: EmbeddedRedis | None = None
        self._children: dict[ServiceRole, Child] = {}
        self._sign_page: Child | None = None
        self._ports: dict[str, int] = {}
        self._unready: dict[ServiceRole, str] = {}
        """By service that is waited for: the last reason why it is not ready."""
        self._door = 0
        """The gateway's port for agents."""
        self.origins: dict[PasskeyUse, str] = {}
        """Where passkeys are used on this stack: the sign page's origin, and the console's."""
        self.note: dict[str, Any] | None = None
        """What `stop` notes for the next stack in this folder, which then resumes with the data; None deletes the data.
        After `start` it is the note of the stack before, if this one resumed.
        """
        self._claim: int | None = None
        """The open file whose lock protects the state folder."""
        self.kafka = options.kafka or ""
        self.redis_url = options.redis_url or ""

    # --- what others need to connect ---

    def url(self, role: ServiceRole) -> str:
        """Return the base URL of a service's HTTP API."""
        return f"http://{LOOPBACK}:{self._ports[role]}"

    @property
    def door(self) -> str | None:
        """Return the gateway's URL for agents; None if there is no gateway."""
        return f"http://{LOOPBACK}:{self._door}" if self._door else None

    @property
    def sockets(self) -> Path:
        """Return the folder with the gateway's socket for each task."""
        return self.options.state / "tasks"

    @property
    def gateway_ca(self) -> Path:
        """Return the certificate by which agents trust the gateway as their proxy."""
        return self.options.state / "gateway-ca.pem"

    @property
    def secrets(self) -> Path:
        """Return the folder with Ringfence's own secrets for targets, a file for each."""
        return self.options.state / "secrets"

    def settings(self) -> ServiceSettings:
        """Return the settings that this stack's services share."""
        return ServiceSettings(**self._shared())  # type: ignore[arg-type]

    def environment(self) -> dict[str, str]:
        """Return `RINGFENCE_*` for a client of this stack: an agent, a sponsor, the command line."""
        shared = {f"RINGFENCE_{name.upper()}": str(value) for name, value in self._shared().items()}
        chosen_roles = [role for role in self.options.services if role in SERVICE_ROLES]
        urls = {f"RINGFENCE_{role.upper()}_URL": self.url(role) for role in chosen_roles}
        return shared | urls | {"RINGFENCE_BACKENDS_SECRETS": str(self.secrets)}

    def child(self, role: ServiceRole) -> Child:
        return self._children[role]

    def children(self) -> dict[str, int]:
        """Return the pid of every process of the stack, by name."""
        own: dict[str, int] = {role: child.pid for role, child in self._children.items()}
        servers = {"kafka": self._broker, "redis": self._valkey}
        own |= {_SIGN_PAGE: self._sign_page.pid} if self._sign_page else {}
        return own | {name: server.child.pid for name, server in servers.items() if server and server.child}

    # --- life ---

    def start(self) -> None:
        """Start everything. Returns when every service is ready. Raises StackError with a remedy."""
        # First: a stack that cannot start leaves no keys behind.
        if not self.kafka:
            embedded_kafka.program()
        if not self.redis_url:
            embedded_redis.program()
        state = self.options.state
        make_private_folder(state)
        make_private_folder(self.secrets)
        self._claim_state()
        self.note = self._take_note()
        self._claim_ports()
        self._make_trust()
        if not self.kafka:
            self._say("starting the broker")
            self._broker = EmbeddedKafka(
                state / "kafka", self.options.kafka_port, log_path=state / "logs" / "kafka.log"
            )
            self._broker.start(resume=self.note is not None)
            self.kafka = self._broker.bootstrap
        if not self.redis_url:
            self._say("starting Valkey")
            self._valkey = EmbeddedRedis(
                state / "redis", self.options.redis_port, log_path=state / "logs" / "redis.log"
            )
            self._valkey.start(resume=self.note is not None)
            self.redis_url = self._valkey.url
        asyncio.run(self._prepare())
        self._say(f"starting {', '.join(self.options.services)}")
        for role in self.options.services:
            self.start_service(role)
        if self.options.sign_page:
            self._start_sign_page()
        self.wait_ready()

    def _start_sign_page(self) -> None:
        origin = self.origins["sign"]
        port = urlsplit(origin).port
        environment = {
            **os.environ,
            **self.environment(),
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_SIGN_PAGE_ORIGIN": origin,
            "RINGFENCE_SIGN_PAGE_SESSION_ORIGINS": json.dumps([self.origins["session"]]),
            "RINGFENCE_SIGN_PAGE_HTTP": f"{LOOPBACK}:{port}",
        }
        self._sign_page = spawn(
            _SIGN_PAGE,
            [sys.executable, "-P", "-m", "ringfence.cli.main", "serve", _SIGN_PAGE],
            env=environment,
            log_path=self.options.state / "logs" / f"{_SIGN_PAGE}.log",
            umask=PRIVATE,
        )

    def _make_trust(self) -> None:
        """Use the trust root in the state folder, or make one."""
        try:
            if not self.trust.root_key.exists():
                self._say("making the trust root, service keys and the first operator")
                rp_id, origins = changed_origins(self._choose_origins(()), int(time.time()))
                make_trust(
                    self.trust, self.options.trust_domain, self.options.operator, rp_id=rp_id, origins=origins
                )
            _, bundle = load_root_and_bundle(self.trust)
            if missing := [
                role for role in missing_on_demand_services(bundle) if role in self.options.services
            ]:
                add_services(self.trust, missing)
            runner = self.options.runner
            if runner is not None and not self.trust.service_key(runner).exists():
                add_runners(self.trust, [runner])
            change = self._choose_origins(bundle.origins)
            if change.sign or change.session:
                set_origins(self.trust, change)
            if "console" in self.options.services:
                # People open it at an origin of the trust bundle, so that is where it listens.
                self._ports["console"] = urlsplit(self.origins["session"]).port or 80
        except RingfenceError as error:
            raise StackError(
                f"{error.message.removesuffix('; run: ringfence init')}. Repair {self.options.state}, delete it to "
                "start without it, or choose another folder by --state."
            ) from None

    def _choose_origins(self, before: Sequence[Origin]) -> OriginChange:
        """Choose the origins of this stack: those of the trust bundle, or else two ports of `localhost`.

        Returns what the bundle lacks. An IP address is no rpId. Free ports stay the same as long as the state folder
        does: passkeys outlast a stack.
        """
        uses: tuple[tuple[PasskeyUse, int], ...] = (("sign", SIGN_PAGE_PORT), ("session", CONSOLE_PORT))
        new: dict[PasskeyUse, list[str]] = {"sign": [], "session": []}
        known = {one.origin for one in before} | {f"http://localhost:{usual}" for _, usual in uses}
        for use, usual in uses:
            present = [one.origin for one in before if one.use == use and one.not_after is None]
            wanted = f"http://localhost:{usual}"
            if present and (wanted in present or not self.options.fixed_ports):
                self.origins[use] = wanted if self.options.fixed_ports else present[-1]
                continue
            while not self.options.fixed_ports and wanted in known:
                wanted = f"http://localhost:{free_port()}"
            known.add(wanted)
            self.origins[use] = wanted
            new[use].append(wanted)
        return OriginChange(new["sign"], new["session"])

    async def _prepare(self) -> None:
        settings = self.settings()
        async with TopicsAdmin(settings) as admin:
            await admin.apply(keep_bytes=self.options.keep_bytes if settings.embedded_broker else None)
        if self.note is not None:
            await publish_bundle(self.trust, settings)
        else:
            await publish_trust(self.trust, settings, self.options.operator, self.options.operator.title())

    def start_service(self, role: ServiceRole) -> None:
        """Start a service, or start it again. Does not wait until it is ready."""
        environment = {
            **os.environ,
            **self.environment(),
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_HTTP": f"{LOOPBACK}:{self._ports[role]}",
            "RINGFENCE_INSTANCE": role,
            "RINGFENCE_KEY_FILE": str(self.trust.service_key(role)),
            "RINGFENCE_KEY_DIR": str(self.options.state / "keys"),
            **(self._gateway_environment() if role == "gateway" else {}),
            **({"RINGFENCE_SIGNALS_URL": self.url(role)} if role == "signals" else {}),
            **({"RINGFENCE_CONSOLE_ORIGIN": self.origins["session"]} if role == "console" else {}),
            **self.options.environment,
        }
        self._children[role] = spawn(
            role,
            [sys.executable, "-P", "-m", "ringfence.cli.main", "serve", role],
            env=environment,
            log_path=self.options.state / "logs" / f"{role}.log",
            umask=PRIVATE,
        )

    def _gateway_environment(self) -> dict[str, str]:
        return {
            "RINGFENCE_GATEWAY_LISTEN": f"{LOOPBACK}:{self._door}",
            "RINGFENCE_GATEWAY_SOCKETS": str(self.sockets),
            "RINGFENCE_GATEWAY_CA_FILE": str(self.gateway_ca),
        }

    def wait_ready(self, roles: Sequence[ServiceRole] | None = None) -> None:
        """Wait until these services (all where None) are ready.

        Raises StackError, which names the first service that is not, says why, and shows the end of its log.
        """
        for role in roles or self.options.services:
            self._children[role].wait_until(
                partial(self._ready, role),
                READY_WITHIN_S,
                "was ready",
                beside=lambda: self.children().values(),
                why=partial(self._unready.get, role),
            )
        if self._sign_page is not None:
            self._sign_page.wait_until(
                partial(_answers, self.origins["sign"]), READY_WITHIN_S, "served the sign page"
            )

    def _ready(self, role: ServiceRole) -> bool:
        reason = readiness(self._ports[role])
        if reason is not None:
            self._unready[role] = reason
        return reason is None

    def ended(self) -> str | None:
        servers = [server.child for server in (self._broker, self._valkey) if server and server.child]
        pages = [self._sign_page] if self._sign_page else []
        for child in [*servers, *pages, *self._children.values()]:
            if not child.alive:
                return f"{child.name} ended with status {child.returncode}; see {child.log_path}\n{child.log_tail(5)}"
        return None

    def stop(self, grace_s: float = _GRACE_S) -> list[str]:
        """Stop everything, services first. It may be called more than once.

        Returns the services that did not shut down cleanly within `grace_s` for all together.
        """
        children = [*self._children.values(), *([self._sign_page] if self._sign_page else [])]
        for child in children:
            child.terminate()
        ends_at = time.monotonic() + grace_s
        ended = dict[Child, int]()
        for child in children:
            status = child.wait(max(0.0, ends_at - time.monotonic()))
            ended[child] = child.kill() if status is None else status
        self._children.clear()
        self._sign_page = None
        if self._valkey is not None:
            self._valkey.stop(keep=self.note is not None)
            self._valkey = None
        if self._broker is not None:
            self._broker.stop(keep=self.note is not None)
            self._broker = None
        if self.note is not None:
            write_private(self._note_file, json.dumps(self.note).encode())
            self.note = None
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None
        return [
            f"{child.name} did not end in good order: status {status}; see {child.log_path}"
            for child, status in ended.items()
            if status
        ]

    @property
    def _note_file(self) -> Path:
        return self.options.state / "kept.json"

    def _take_note(self) -> dict[str, Any] | None:
        """Return what the stack before noted, and remove the note: a stack that is killed leaves no data to resume."""
        try:
            note: dict[str, Any] = json.loads(self._note_file.read_bytes())
        except (OSError, ValueError):
            return None
        self._note_file.unlink()
        return note if self.options.resume and self.trust.root_key.exists() else None

    def forget(self) -> None:
        """Delete the state folder; only after `stop`."""
        shutil.rmtree(self.options.state, ignore_errors=True)

    def __enter__(self) -> Stack:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _claim_state(self) -> None:
        """Lock the state folder: two stacks in one folder would delete each other's data.

        The lock ends with this process.
        """
        claim = open_private(self.options.state / "lock", os.O_RDWR)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(claim)
            raise StackError(
                f"Another stack runs in {self.options.state}: end it, or choose another folder by --state."
            ) from None
        self._claim = claim

    def _claim_ports(self) -> None:
        for role in self.options.services:
            if self.options.fixed_ports:
                self._ports[role] = claim_port(PORTS[role], f"The {role}", "--free-ports")
            else:
                self._ports[role] = free_port()
        if self.options.sign_page and self.options.fixed_ports:
            claim_port(SIGN_PAGE_PORT, "The sign page", "--free-ports")
        if "gateway" in self.options.services:
            fixed = self.options.fixed_ports
            self._door = claim_port(GATEWAY_PORT, "The gateway", "--free-ports") if fixed else free_port()

    def _shared(self) -> dict[str, object]:
        options = self.options
        return {
            "kafka": self.kafka,
            "redis_url": self.redis_url,
            "trust_domain": options.trust_domain,
            "trust_root": self.trust.fingerprint(),
            "topic_prefix": options.topic_prefix,
            "redis_prefix": options.redis_prefix,
            "partitions": options.partitions,
            "embedded_broker": options.kafka is None or options.embedded_broker,
            "issuer_url": self._service_url("issuer"),
            "policy_url": self._service_url("policy"),
        }

    def _service_url(self, role: ServiceRole) -> str:
        return self.url(role) if role in self._ports else f"http://{LOOPBACK}:{PORTS[role]}"


def _answers(origin: str) -> bool:
    """Whether the sign page is served at an origin of this machine."""
    url = urlsplit(origin)
    connection = http.client.HTTPConnection(LOOPBACK, url.port, timeout=_ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/", headers={"Host": url.netloc})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def readiness(port: int) -> str | None:
    """Return None if the service on this port is ready, else the reason, as far as the service gives one."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return f"/readyz on port {port} does not answer"
    finally:
        connection.close()
    if response.status == 200:
        return None
    try:
        return "; ".join(map(str, json.loads(body)["reasons"]))
    except (ValueError, KeyError, TypeError):
        return f"/readyz on port {port} answers {response.status}"
