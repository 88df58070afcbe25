"""Every Redis key of the lease store, and what it holds."""

from __future__ import annotations

from ringfence.messages.lease import Lease
from ringfence.model.leases.lifecycle import shared_selector_keys

DAY_MS = 24 * 3600 * 1000
RECORD_KEEP_MS = DAY_MS
"""How long a lease's record stays after its end: its decision, if it is redelivered, must find it."""
FENCE_KEEP_MS = 8 * DAY_MS
"""How long a fence stays: longer than Kafka keeps requests, so that nothing that it covers can still come."""
SELECTOR_KEEP_MS = 31 * DAY_MS
"""How long it is remembered where a selector was seen first: longer than Kafka keeps it."""
GRANT_KEEP_MS = 13 * 3600 * 1000
"""How long it is remembered which leases named a grant: longer than a grant lives, shorter than their records stay."""
BUDGET_KEEP_MS = DAY_MS
"""How long it is remembered what a task used, after its end: answers of its last requests are still settled."""
MIN_LEFT_MS = 300
"""A lease with less time left is not activated. So a revoker that looks more often than this misses no deadline."""
AHEAD_MS = 60_000
"""How long before its minute a lease is moved to the sorted set of deadlines."""
CLOSING_TOKEN = "!"  # noqa: S105 - names an attempt, opens nothing
"""The token of revokers that abort a lease that is still minting: nobody can take the lease over from them."""

ID_BYTES = 16
REBUILD_ALL = b"anew"
"""Value of the epoch key: the shard is to be rebuilt completely, also leases that it has."""

# Key names after the hash tag and a colon. Scripts build the same names: they know the shard by their last key.
LEASES = "leases"
ENDED = "ended:"
SIGNERS = "signers"
DEADLINES = "deadlines"
MINUTES = "minutes"
DUE = "due:"
SPREAD = "spread"
REBUILDING = "rebuilding"
BY_AGENT = "by:agent:"
AGENTS = "agents:"
LIVE = "live:"
OUTBOX = "outbox"
SELECTOR = "selector:"
GRANT = "grant:"
BUDGET = "budget:"
THUMBPRINT = "key"
"""A field in the hash of an agent's leases: the thumbprint of its key, which stored records leave out."""


class Keys:
    """Every key of one shard. The part in braces is the hash tag. Lease ids are in keys as `uuid_bytes`.

    The names are the version of the layout: a service that knows other names finds no epoch, and has Redis rebuilt.
    """

    def __init__(self, prefix: str, shard: int) -> None:
        base = f"{prefix}{{{shard}}}:"
        self._base = base
        self.shard = shard
        self.epoch = base + "epoch"
        """String: the server that the shard was last rebuilt on (`server_id`), a dot, the epoch that began then.
        Without it every operation fails: Redis may have forgotten leases. `REBUILD_ALL` if a person wants a rebuild."""
        self.spread = base + SPREAD
        """String: the number of shards when this one was last rebuilt. It decides the shard of a lease."""
        self.begun = base + "begun"
        """String: when the epoch began, in ms. What was counted before may be lost."""
        self.rebuilding = base + REBUILDING
        """String: the claim of the revoker that rebuilds the shard now, expiring unless it is renewed."""
        self.leases = base + LEASES
        """Hash by lease id, of leases that have not ended: head, line feed, signed record. The head is `<status><seq>
        <deadline s>`, with the status as a letter (`LETTERS`); while a lease is minting also the token of its issuer,
        from the cut on the record's epoch. Scripts store less of it (`codec.lua`)."""
        self.ended_prefix = f"{base}{ENDED}".encode()
        """Prefix before the id of an ended lease. String: head and record as above, with an expiry."""
        self.signers = base + SIGNERS
        """Hash, both ways: signers of records (key, trust domain and name), and the byte for each in stored records."""
        self.deadlines = base + DEADLINES
        """Sorted set: active leases that are due within a minute or two, by deadline in ms."""
        self.minutes = base + MINUTES
        """Sorted set: minutes (since 1970) in which other active leases are due, by the time in ms when those are moved
        to the deadlines."""
        self.due_prefix = base + DUE
        """Prefix before a minute. Set: the ids of these leases."""
        self.claimed = base + "claimed"
        """Sorted set: leases that an issuer is minting or a revoker is ending, by the time in ms from which a revoker
        may take them over."""
        self.outbox = base + OUTBOX
        """Hash by `<lease id>:<seq>`: signed records that Kafka has not acknowledged yet."""
        self.outbox_times = base + "outbox-times"
        """Sorted set: the fields of the outbox, by the time in ms when they were written or last taken."""
        self.fences = base + "fences"
        """Sorted set: selector keys (`task:<id>`, `all`), by `issued_before` in ms."""
        self.live_prefix = f"{base}{LIVE}".encode()
        """Prefix before a lease id. Empty string that expires at the deadline, and is deleted at the cut."""
        self.index_prefix = base + BY_AGENT
        """Prefix before an agent id. Hash: the ids of its leases that have not ended, without values, and the
        thumbprint of its key (`THUMBPRINT`)."""
        self.agents_prefix = base + AGENTS
        """Prefix before the selector key of a sponsor or user. Hash: the agents that have such leases, and how many
        each. There is no index by task, as a task has one agent. There is none by target: it would be as large as a set
        of all leases, and is seldom needed."""

    def live(self, id: bytes) -> bytes:
        return self.live_prefix + id

    def ended(self, id: bytes) -> bytes:
        return self.ended_prefix + id

    def due(self, deadline_s: int) -> str:
        """Set: the ids of leases that are due in the same minute, until a minute before it."""
        return f"{self.due_prefix}{deadline_s // 60}"

    def index(self, agent_id: str) -> str:
        """Hash: the ids of the leases of an agent that have not ended, and `THUMBPRINT`."""
        return self.index_prefix + agent_id

    def agents(self, selector_key: str) -> str:
        """Hash: the agents whose leases match the selector key of a sponsor or user and have not ended, and how
        many."""
        return self.agents_prefix + selector_key

    def indexes(self, lease: Lease) -> tuple[str, ...]:
        """The indexes in which a lease is entered until it ends."""
        return (self.index(lease.agent_id), *map(self.agents, shared_selector_keys(lease)))

    def grant(self, id: str) -> str:
        """Set: the ids of the leases that name a grant, on the grant's shard. It expires `GRANT_KEEP_MS` after the
        last."""
        return f"{self._base}{GRANT}{id}"

    def budget(self, task_id: str) -> str:
        """Hash: the epoch in which it began, and by `<task>:tokens` and `<task>:requests` what a task that a person
        assigned, and each part of it, have used or reserved. It expires `BUDGET_KEEP_MS` after the end of the task."""
        return f"{self._base}{BUDGET}{task_id}"

    def selector(self, id: str) -> str:
        """String: where on Kafka a selector was seen first, as `<topic> <partition> <offset> <append time>`."""
        return f"{self._base}{SELECTOR}{id}"


def is_kept(key: bytes) -> bool:
    """Whether a key stays when all shards are emptied: the number of shards, and the rebuild's claim."""
    return key.endswith((f"}}:{SPREAD}".encode(), f"}}:{REBUILDING}".encode()))


def shard_of(id: str, shards: int) -> int:
    """The shard of a lease, or of any other derived id: those are evenly distributed."""
    return int(id[:8], 16) % shards


def uuid_bytes(id: str) -> bytes:
    """A UUID in 16 bytes instead of 36, as each lease has it in several keys."""
    return bytes.fromhex(id.replace("-", ""))


def uuid_text(id: bytes) -> str:
    """The text of a UUID that `uuid_bytes` made."""
    text = id.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def outbox_field(lease_id: str, seq: int) -> bytes:
    """The field of one record in the outbox."""
    return b"%b:%d" % (uuid_bytes(lease_id), seq)


def shard_of_key(prefix: str, key: bytes) -> int | None:
    """The shard in a key's hash tag, also if there is no such shard; None if the key has no such tag."""
    tag, end, _ = key[len(prefix) + 1 :].partition(b"}:")
    return int(tag) if end and tag.isdigit() else None


def is_outbox_field(field: bytes) -> bool:
    """Whether this is a field that `outbox_field` made."""
    return field[ID_BYTES : ID_BYTES + 1] == b":" and field[ID_BYTES + 1 :].isdigit()


def lease_of_field(field: bytes) -> tuple[str, int]:
    """The lease and the `seq` of a field that `outbox_field` made."""
    return uuid_text(field[:ID_BYTES]), int(field[ID_BYTES + 1 :])
