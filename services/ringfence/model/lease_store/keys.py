"""Every Redis key of the lease store, and what stands in it."""

from __future__ import annotations

from ringfence.messages.lease import Lease
from ringfence.model.leases.lifecycle import shared_selector_keys

DAY_MS = 24 * 3600 * 1000
RECORD_KEEP_MS = DAY_MS
"""How long a lease's record stays after its end: its decision, delivered again, must find it."""
FENCE_KEEP_MS = 8 * DAY_MS
"""How long a fence stands: longer than a request is kept on Kafka, so nothing that it covers can still come."""
SELECTOR_KEEP_MS = 31 * DAY_MS
"""How long it is remembered where a selector was seen first: longer than it stays on Kafka."""
GRANT_KEEP_MS = 13 * 3600 * 1000
"""How long it is remembered which leases named a grant: longer than a grant lives, and less long than their records."""
MIN_LEFT_MS = 300
"""What ends sooner is not activated. A revoker may look for new deadlines this much less often than it meets them."""
AHEAD_MS = 60_000
"""How long before its minute a lease that is due in it comes to the deadlines."""
CLOSING_TOKEN = "!"  # noqa: S105 - names an attempt, opens nothing
"""The token of revokers that abort a lease which is still minting: nobody can take it over from them."""

ID_BYTES = 16
ANEW = b"anew"
"""In the place of an epoch: the shard is to be rebuilt, and every lease put where it belongs."""

# What follows the hash tag and a colon. Scripts put the same names together: they know the shard by their last key.
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
THUMBPRINT = "key"
"""A field among the leases of an agent: that of its key which their records leave out."""


class Keys:
    """Every key of one shard. The part in braces is the hash tag. Ids of leases stand in them as `uuid_bytes`.

    The names decide which layout this is: to a service that knows another one, the epoch is missing, and Redis lost.
    """

    def __init__(self, prefix: str, shard: int) -> None:
        base = f"{prefix}{{{shard}}}:"
        self._base = base
        self.shard = shard
        self.epoch = base + "epoch"
        """The server that the shard was last rebuilt on (`server_id`), a dot, the epoch that began then. Without it
        nothing works: whoever cannot know whether Redis has forgotten leases must not go on. `ANEW` where a person
        wants it to be rebuilt."""
        self.spread = base + SPREAD
        """Over how many shards leases were spread when this one was last rebuilt: in which a lease stands follows."""
        self.rebuilding = base + REBUILDING
        """The claim of who rebuilds the shard now, for as long as it gives signs of life."""
        self.leases = base + LEASES
        """Hash: the ids of leases that have not ended to `<status><seq> <deadline s>`, while one is minting the token
        of who mints it, from the cut on the epoch that the record bears, a line feed, the signed record. The status is
        a letter (`LETTERS`). Of active ones what the record says is left out, and some of the record (`scripts`)."""
        self.ended_prefix = f"{base}{ENDED}".encode()
        """Before the id of a lease that has ended: the same, for a while."""
        self.signers = base + SIGNERS
        """Hash: who signed records (key, trust domain and name) to a byte that stands for it in them, and back."""
        self.deadlines = base + DEADLINES
        """Sorted set: active leases that are due within a minute or two by their deadlines, in ms."""
        self.minutes = base + MINUTES
        """Sorted set: minutes (since 1970) in which others are due, by when, in ms, those come to the deadlines."""
        self.due_prefix = base + DUE
        """Before a minute: a set of the ids of these."""
        self.claimed = base + "claimed"
        """Sorted set: leases that an issuer is minting or a revoker is ending, by the time, in ms, from which a revoker
        may take them over."""
        self.outbox = base + OUTBOX
        """Hash: `<lease id>:<seq>` to a signed lease record that Kafka has not acknowledged yet."""
        self.outbox_times = base + "outbox-times"
        """Sorted set: the fields of the outbox by the time, in ms, when they were written or last taken."""
        self.fences = base + "fences"
        """Sorted set: marks (`task:<id>`, `all`) by `issued_before` in ms."""
        self.live_prefix = f"{base}{LIVE}".encode()
        """Before a lease id: an empty string that Redis expires at the deadline; gone from the cut on."""
        self.index_prefix = base + BY_AGENT
        """Before the id of an agent: a hash of the ids of its leases that have not ended, with nothing, and the
        thumbprint of its key (`THUMBPRINT`)."""
        self.agents_prefix = base + AGENTS
        """Before the mark of a sponsor or user: a hash of the agents that have such leases, and how many each. There is
        none of a task, which is one agent's, and none of a target: that many agents use many targets would make it as
        large as a set of leases, and it is seldom asked for."""

    def live(self, id: bytes) -> bytes:
        return self.live_prefix + id

    def ended(self, id: bytes) -> bytes:
        return self.ended_prefix + id

    def due(self, deadline_s: int) -> str:
        """Set: the ids of leases that are due in the same minute, until that has nearly come."""
        return f"{self.due_prefix}{deadline_s // 60}"

    def index(self, agent_id: str) -> str:
        """Hash: the ids of the leases of an agent that have not ended, and `THUMBPRINT`."""
        return self.index_prefix + agent_id

    def agents(self, selector_key: str) -> str:
        """Hash: the agents of the leases that bear a wide mark and have not ended, and how many each has."""
        return self.agents_prefix + selector_key

    def indexes(self, lease: Lease) -> tuple[str, ...]:
        """Where a lease is found that has not ended."""
        return (self.index(lease.agent_id), *map(self.agents, shared_selector_keys(lease)))

    def grant(self, id: str) -> str:
        """Set: the ids of the leases that name a grant. On the shard of the grant, `GRANT_KEEP_MS` past the last."""
        return f"{self._base}{GRANT}{id}"

    def selector(self, id: str) -> str:
        """Where on Kafka a selector was seen first: `<topic> <partition> <offset> <append time>`."""
        return f"{self._base}{SELECTOR}{id}"


def is_kept(key: bytes) -> bool:
    """Whether a key stays where all that shards hold is thrown away: what tells of that, and who is at it."""
    return key.endswith((f"}}:{SPREAD}".encode(), f"}}:{REBUILDING}".encode()))


def shard_of(id: str, shards: int) -> int:
    """The shard of a lease, or of any derived id: those are evenly spread."""
    return int(id[:8], 16) % shards


def uuid_bytes(id: str) -> bytes:
    """A UUID in 16 bytes instead of 36: it stands in a handful of places for each lease."""
    return bytes.fromhex(id.replace("-", ""))


def uuid_text(id: bytes) -> str:
    """A UUID that `uuid_bytes` made."""
    text = id.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def outbox_field(lease_id: str, seq: int) -> bytes:
    """The name of one record in the outbox."""
    return b"%b:%d" % (uuid_bytes(lease_id), seq)


def shard_of_key(prefix: str, key: bytes) -> int | None:
    """The shard whose tag a key bears, also where there is no such shard; None where it bears none."""
    tag, end, _ = key[len(prefix) + 1 :].partition(b"}:")
    return int(tag) if end and tag.isdigit() else None


def is_outbox_field(field: bytes) -> bool:
    """Whether something is the name of a record in the outbox."""
    return field[ID_BYTES : ID_BYTES + 1] == b":" and field[ID_BYTES + 1 :].isdigit()


def lease_of_field(field: bytes) -> tuple[str, int]:
    """The lease and the `seq` that a field of the outbox is about."""
    return uuid_text(field[:ID_BYTES]), int(field[ID_BYTES + 1 :])
