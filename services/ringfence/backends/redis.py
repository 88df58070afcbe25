"""Backend for Valkey and Redis (7 or newer): an ACL user for each lease, deleted with it, together with its
connections.

The ACL allows exactly what the lease's scope says, or no credential is made:

- Verbs: `read` is every command that only reads the keys that it names, with read access to them (`%R~`). `write` is
every command that changes keys that it names, with write access to them (`%W~`). Commands that also return the old
value (GETDEL, INCR) need `read` in the same permission. Each command of the two lists is also a verb of its own. The
lists are closed: no lease allows a command that a newer server adds.
- Resources: a resource is a key. Redis's `*` also matches `/`, so the only wildcard that can be expressed is `**`: a
whole segment that stands for any number of segments. `*` inside a segment is refused.
- Each permission becomes ACL selectors of its own. Together they allow what any of them allows, and no more.

A key whose name is not valid in Ringfence's grammar cannot be named. It is covered by the `**` of its prefix.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal
from urllib.parse import quote

from ringfence.backends.http import ConnectionCache
from ringfence.backends.secret_sources import AccessError, TargetAccess
from ringfence.backends.target_settings import (
    InexactError,
    TargetError,
    TargetRefusedError,
    problem_of,
    settings_of,
)
from ringfence.messages.base import UUID, Permission
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.scope.globs import ScopeError, parse_glob
from ringfence.model.target_settings import TargetSettings

if TYPE_CHECKING:
    from redis.exceptions import ResponseError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


READ: Final = _words("""
    bitcount bitfield_ro bitpos exists expiretime geodist geohash geopos georadius_ro georadiusbymember_ro
    geosearch get getbit getrange hexists hget hgetall hkeys hlen hmget hrandfield hscan hstrlen hvals lcs
    lindex llen lpos lrange mget pexpiretime pttl scard sdiff sinter sintercard sismember smembers
    smismember srandmember sscan strlen sunion ttl type xlen xpending xrange xread xrevrange zcard zcount
    zdiff zinter zintercard zlexcount zmscore zrandmember zrange zrank zrevrank zscan zscore zunion
""")
"""Commands of `read`: they name all their keys and change nothing."""
WRITE: Final = _words("""
    append bitfield bitop decr decrby del expire expireat geoadd geosearchstore getdel getex getset hdel
    hincrby hincrbyfloat hset hsetnx incr incrby incrbyfloat linsert lmove lmpop lpop lpush lpushx lrem lset
    ltrim mset msetnx persist pexpire pexpireat pfadd pfmerge psetex rename renamenx rpop rpush rpushx sadd
    sdiffstore set setbit setex setnx setrange sinterstore smove spop srem sunionstore unlink xack xadd
    xautoclaim xclaim xdel xreadgroup xtrim zadd zdiffstore zincrby zinterstore zmpop zpopmax zpopmin
    zrangestore zrem zremrangebylex zremrangebyrank zremrangebyscore zunionstore
""")
"""Commands of `write`: they name all their keys and stay in their database."""
_EVERYBODY: Final = ("ping", "hello", "quit", "multi", "exec", "discard", "client|setinfo")
"""Commands that clients need and that touch no key."""
MAX_PATTERNS: Final = 256

# Characters, besides letters, digits and marks, that stand for themselves in Redis's globs and in a selector.
_PLAIN_SIGNS: Final = frozenset("/-_.:,=@+~!$&|<>")
_CONNECT_S: Final = 2.0
_ANSWER_S: Final = 5.0
_NOT_THIS_CREDENTIAL: Final = "Error in ACL SETUSER"


def rules(scope: Iterable[Permission]) -> list[str]:
    """Return the rules for `ACL SETUSER` that allow exactly a scope. Raises InexactError."""
    selectors: list[str] = []
    for permission in scope:
        keys = [pattern for glob in permission.resources for pattern in _patterns(glob)]
        if len(keys) > MAX_PATTERNS:
            raise InexactError(f"the resources make {len(keys)} key patterns: write fewer '**'")
        for commands, access in _kinds(permission.verbs):
            allowed = " ".join(f"+{command}" for command in sorted(commands))
            named = " ".join(f"%{access}~{key}" for key in dict.fromkeys(keys))
            selectors.append(f"({allowed} {named})")
    if not selectors:
        raise InexactError("the scope is empty")
    return selectors


def _kinds(verbs: Iterable[str]) -> list[tuple[frozenset[str], str]]:
    """Return groups of commands, each with the access to its keys. Raises InexactError."""
    remaining = set(verbs)
    kinds: list[tuple[frozenset[str], str]] = []
    if {"read", "write"} <= remaining:
        kinds.append((READ | WRITE, "RW"))
    elif "read" in remaining:
        kinds.append((READ, "R"))
    elif "write" in remaining:
        kinds.append((WRITE, "W"))
    for verb in sorted(remaining - {"read", "write"}):
        if verb in WRITE:
            kinds.append((frozenset({verb}), "RW"))
        elif verb in READ:
            kinds.append((frozenset({verb}), "R"))
        else:
            raise InexactError(f"the verb {verb} is none: read, write, or one command that names its keys")
    return kinds


def _patterns(glob: str) -> list[str]:
    """Return the Redis patterns that together match the same names as one of Ringfence's globs. Raises InexactError."""
    try:
        segments = parse_glob(glob).segments
    except ScopeError as error:
        raise InexactError(str(error)) from None
    for segment in segments:
        if segment != "**":
            _check(glob, segment)
    if segments == ("**",):
        return ["*"]
    choices = [("", "*") if segment == "**" else (segment,) for segment in segments]
    if sum(segment == "**" for segment in segments) > MAX_PATTERNS.bit_length() - 1:
        raise InexactError(f"{glob!a} has too many '**'")
    return ["/".join(part for part in parts if part) for parts in itertools.product(*choices)]


def _check(glob: str, segment: str) -> None:
    for character in segment:
        if character == "*":
            raise InexactError(f"{glob!a}: Redis's '*' also matches '/': write '**', or the keys one by one")
        if character not in _PLAIN_SIGNS and unicodedata.category(character)[0] not in "LMN":
            raise InexactError(f"{glob!a}: {character!a} cannot be said exactly in an ACL of Redis")


class _Server:
    def __init__(self, target_id: str, url: str) -> None:
        """Raises AccessError if the URL is unusable."""
        # Policy and gateway know the backend, and never come here.
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        try:
            self.client: Any = Redis.from_url(
                url,
                socket_connect_timeout=_CONNECT_S,
                socket_timeout=_ANSWER_S,
                retry=Retry(NoBackoff(), 1),  # a connection may have died since it was last used
            )
        except ValueError:
            raise AccessError(f"the rights at target {target_id} are no redis:// URL") from None

    async def close(self) -> None:
        await self.client.aclose()


class RedisBackend:
    """Mints ACL users whose password only the agent knows: the server receives its SHA-256."""

    kind: ClassVar[str] = "redis"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "target"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "none"
    stateless: ClassVar[bool] = False

    def __init__(self, trust_domain: str, access: TargetAccess) -> None:
        self._prefix = f"ringfence.{trust_domain}."
        self._access = access
        self._servers = ConnectionCache(access, _Server)

    def user_of(self, lease_id: str) -> str:
        """Return the name of a lease's user. It also separates trust domains that share a server."""
        return self._prefix + lease_id

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """Return `session`: open sessions are ended too."""
        return "session"

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Return the reason why exactly this credential cannot be made, or None."""
        return problem_of(rules, lease.scope, target, TargetSettings, self._access)

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """Create a user with a new password. A second call for the same lease adds one more password to the same user.

        Raises TargetError, TargetRefusedError, AccessError.
        """
        user, password = self.user_of(lease.lease_id), secrets.token_urlsafe(32)
        address = await self._address(target)
        try:
            allowed = rules(lease.scope)
        except InexactError as error:
            raise TargetRefusedError(str(error)) from None
        await self._run(
            lease.target_id,
            "ACL", "SETUSER", user, "on", "-@all", "resetkeys", "resetchannels", "clearselectors",
            f"#{hashlib.sha256(password.encode()).hexdigest()}",
            *(f"+{command}" for command in _EVERYBODY),
            *allowed,
        )  # fmt: skip
        return Credential(
            kind=self.kind,
            value=f"{address[0]}://{quote(user, safe='')}:{password}@{address[1]}/0",
            expires_at=lease.deadline,
        )

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Delete the user, which ends its connections. Raises TargetError, AccessError."""
        await self._run(target_id, "ACL", "DELUSER", self.user_of(lease_id))

    async def existing(self, target_id: str) -> frozenset[str]:
        """Return the leases that have a user at the target. Raises TargetError, AccessError."""
        users = await self._run(target_id, "ACL", "USERS")
        names = (name.decode("utf-8", "replace") for name in users)
        lease_ids = (name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix))
        return frozenset(id for id in lease_ids if UUID.fullmatch(id))

    standing = existing

    async def close(self) -> None:
        await self._servers.close()

    # --- the server ---

    async def _address(self, target: TargetState) -> tuple[str, str]:
        """Return the scheme and `host:port` for agents: from the target's record, else where Ringfence itself
        connects.
        """
        connected_to = (await self._servers.at(target.target_id)).client.connection_pool.connection_kwargs
        if connected_to.get("db"):
            raise AccessError(
                f"target {target.target_id} names database {connected_to['db']}: only 0 can be kept to"
            )
        address = settings_of(target, TargetSettings).address
        scheme = "rediss" if "ssl_cert_reqs" in connected_to else "redis"
        return scheme, address or f"{connected_to.get('host')}:{connected_to.get('port', 6379)}"

    async def _run(self, target_id: str, *command: str) -> Any:
        from redis.exceptions import RedisError, ResponseError

        try:
            server = await self._servers.at(target_id)
            return await server.client.execute_command(*command)
        except ResponseError as error:
            # An error's text can quote what was sent: only its kind is passed on.
            if str(error).startswith(_NOT_THIS_CREDENTIAL):
                raise TargetRefusedError(
                    f"target {target_id} does not know all commands of this scope: name them one by one"
                ) from None
            raise TargetError(f"target {target_id} refuses: {_kind(error)}") from None
        except (RedisError, OSError) as error:
            raise TargetError(f"target {target_id} does not answer ({type(error).__name__})") from None


def _kind(error: ResponseError) -> str:
    error_code = str(error).partition(" ")[0]
    return error_code if re.fullmatch(r"[A-Z]{2,20}", error_code) else type(error).__name__
