"""The Lua scripts of the lease store: each is one atomic step, by Redis's clock.

The guard: the last key of each script is the epoch key of the shard, the last argument the value that it must have. So
a script does nothing on a Redis that may have lost leases. In the scripts of a rebuild, the guard is the rebuild's
claim instead. From the guard's name, scripts derive the other keys of the shard that they need for many leases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from ringfence.model.lease_store.codec import MAX_LUA_ARGUMENTS, RECORDS_LUA
from ringfence.model.lease_store.keys import (
    AHEAD_MS,
    DEADLINES,
    DUE,
    LIVE,
    MINUTES,
    REBUILD_ALL,
    THUMBPRINT,
    Keys,
)

Argument = str | bytes | int
Command = tuple[Argument, ...]

LOST = "LOST"
"""How the error of a script begins if the guard has another value."""

_ALWAYS = "#!lua flags=allow-oom\n"
_COMMAND = f"{_ALWAYS}return redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))"
_GUARD = f"""
local guard, expected = table.remove(KEYS), table.remove(ARGV)
if redis.call('GET', guard) ~= expected then return redis.error_reply('{LOST} epoch') end
"""
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# Deadlines. Leases that are due in a later minute wait in one set for that minute: an id there takes a quarter of the
# memory of one with its own deadline. `open` moves some of them to the deadlines when their minute has nearly come.
# An id is added to its new key before it is removed from the old one: while a cluster moves a slot key by key, a script
# fails at a key that has moved already, and what it has done by then stays done.
_DEADLINES = f"""
local deadlines, minutes, due = base .. '{DEADLINES}', base .. '{MINUTES}', base .. '{DUE}'
local function await(id, deadline)
    local minute = math.floor(deadline / 60000)
    local open_at = minute * 60000 - {AHEAD_MS}
    if open_at <= now then
        redis.call('ZADD', deadlines, deadline, id)
    else
        redis.call('SADD', due .. minute, id)
        redis.call('ZADD', minutes, open_at, minute)
    end
end
local function in_parts(all, call)
    for first = 1, #all, {MAX_LUA_ARGUMENTS} do
        call(unpack(all, first, math.min(first + {MAX_LUA_ARGUMENTS - 1}, #all)))
    end
end
local function forget(ids, deadlines_s)
    if redis.call('ZREM', deadlines, unpack(ids)) == #ids then return end
    local by_minute = {{}}
    for i, id in ipairs(ids) do
        local minute = math.floor(deadlines_s[i] / 60)
        by_minute[minute] = by_minute[minute] or {{}}
        table.insert(by_minute[minute], id)
    end
    for minute, some in pairs(by_minute) do redis.call('SREM', due .. minute, unpack(some)) end
end
local function open(limit)
    local minute = redis.call('ZRANGEBYSCORE', minutes, '-inf', now, 'LIMIT', 0, 1)[1]
    if not minute then return end
    local ids, scored = redis.call('SRANDMEMBER', due .. minute, limit), {{}}
    for _, id in ipairs(ids) do
        local status, _, deadline_s = head_of(id)
        -- Without a record it is moved too: whoever claims it reports what is wrong.
        if status == 'a' or not status then
            scored[#scored + 1] = (deadline_s or minute * 60) * 1000
            scored[#scored + 1] = id
        end
    end
    in_parts(scored, function(...) redis.call('ZADD', deadlines, ...) end)
    in_parts(ids, function(...) redis.call('SREM', due .. minute, ...) end)
    if #ids < limit then redis.call('ZREM', minutes, minute) end
end
"""

# Indexes: the leases of an agent (keys[1], a hash); the agents of a sponsor and of a user (the other keys), with the
# number of leases of each. The thumbprint of the agent's key is deleted with the agent's last lease, which is its last
# with a sponsor too.
_INDEXES = f"""
local function enter(keys, id, agent)
    if redis.call('HSETNX', keys[1], id, '') == 0 then return end
    for i = 2, #keys do redis.call('HINCRBY', keys[i], agent, 1) end
end
local function leave(keys, ids, agent)
    local count = redis.call('HDEL', keys[1], unpack(ids))
    if count == 0 then return end
    for i = 2, #keys do
        if redis.call('HINCRBY', keys[i], agent, -count) <= 0 then
            redis.call('HDEL', keys[i], agent)
            if redis.call('HLEN', keys[1]) == 1 then redis.call('HDEL', keys[1], '{THUMBPRINT}') end
        end
    end
end
"""


class Script:
    """One script, and its SHA-1, by which Redis knows it.

    A full Redis (`maxmemory`, `noeviction`) refuses scripts that write. Those that end leases, which frees memory, run
    `always`.
    """

    def __init__(self, text: str, *, always: bool = False) -> None:
        self.text = (_ALWAYS if always else "") + _GUARD + _NOW + text
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


def always(name: str, key: str | bytes, *args: Argument) -> Command:
    """A command on one key that also a full Redis runs."""
    return ("EVAL", _COMMAND, 1, key, name, *args)


# Fences are pruned by Redis's clock: one with a time in the future, from a broker with a wrong clock, ages no other.
_FENCE = f"""{_ALWAYS}{_NOW}
redis.call('ZADD', KEYS[1], 'GT', unpack(ARGV, 3))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', math.min(now, ARGV[1]) - ARGV[2])
return now
"""


def fencing(fences: str, wanted: Mapping[str, int], keep_ms: int) -> list[Command]:
    """Commands that write fences (`issued_before` in ms by selector key) to a shard, also to a full Redis.

    Each answers Redis's time, in ms. Fences that are `keep_ms` older than the newest can cover nothing more, and are
    deleted. Each command writes some: after a week there are as many fences as tasks were ended.
    """
    newest_ms = max(wanted.values(), default=0)
    scored = [(before_ms, key) for key, before_ms in wanted.items()]
    parts = [scored[start : start + MAX_LUA_ARGUMENTS] for start in range(0, len(scored), MAX_LUA_ARGUMENTS)]
    return [
        ("EVAL", _FENCE, 1, fences, newest_ms, keep_ms, *(one for pair in part for one in pair))
        for part in parts
    ]


# --- issuing ----------------------------------------------------------------------------------------------------------

# Whether a fence or the deadline forbids issuing the lease. Of ARGV: 2 deadline, 3 requested at, 7 least time left,
# 11... selector keys.
_FORBIDDEN = """
local function forbidden(fences)
    local selector_keys = {unpack(ARGV, 11)}
    for i, before in ipairs(redis.call('ZMSCORE', fences, unpack(selector_keys))) do
        if before and tonumber(before) >= tonumber(ARGV[3]) then return {'fenced', selector_keys[i]} end
    end
    if ARGV[2] - now < tonumber(ARGV[7]) then return {'late'} end
end
"""

# KEYS: claimed, outbox, outbox times, fences, index...
# ARGV: id, deadline, requested at, head of the record, record, outbox field, least time left, token, time to mint,
#       agent, selector key...
_PREPARE = (
    RECORDS_LUA
    + _INDEXES
    + _FORBIDDEN
    + """
local known = record_of(ARGV[1])
local head, token, signed = string.match(known or '', '^(m%d+ %d+) (%S+)\\n(.*)')
if known and (not head or token == '!' and ARGV[8] ~= token) then return {'known', known} end
local no = forbidden(KEYS[4])
if no then return no end
redis.call('ZADD', KEYS[1], now + ARGV[9], ARGV[1])
if known then
    head = head .. ' ' .. ARGV[8]
    store(ARGV[1], head, signed)
    return {'prepared', head .. '\\n' .. signed}
end
store(ARGV[1], ARGV[4] .. ' ' .. ARGV[8], ARGV[5])
redis.call('HSET', KEYS[2], ARGV[6], ARGV[5])
redis.call('ZADD', KEYS[3], now, ARGV[6])
enter({unpack(KEYS, 5)}, ARGV[1], ARGV[10])
return {'prepared'}
"""
)
PREPARE = Script(_PREPARE)
CLOSE = Script(_PREPARE, always=True)
"""As PREPARE, by a revoker that keeps the issuer from activating the lease."""

# KEYS: live, claimed, outbox, outbox times, fences, index...
# ARGV: id, deadline, requested at, head of the record, record, outbox field, least time left,
#       token that the `minting` record must have, else '', seq of that record, agent, selector key...
ACTIVATE = Script(
    RECORDS_LUA
    + _DEADLINES
    + _INDEXES
    + _FORBIDDEN
    + """
local known = record_of(ARGV[1])
if ARGV[8] ~= '' then
    if known == ARGV[4] .. '\\n' .. ARGV[5] then return {'activated'} end
    if not known then return {'lost'} end
    local seq, token = string.match(known, '^m(%d+) %d+ (%S+)')
    if token ~= ARGV[8] or seq ~= ARGV[9] then return {'lost', known} end
elseif known then
    return {'known', known}
end
local no = forbidden(KEYS[5])
if no then return no end
store(ARGV[1], ARGV[4], ARGV[5])
redis.call('SET', KEYS[1], '', 'PXAT', ARGV[2])
await(ARGV[1], tonumber(ARGV[2]))
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[6], ARGV[5])
redis.call('ZADD', KEYS[4], now, ARGV[6])
enter({unpack(KEYS, 6)}, ARGV[1], ARGV[10])
return {'activated'}
"""
)

# KEYS: uses of a grant. ARGV: id of the lease that names it, the limit, how long the uses are remembered.
_USE_GRANT = """
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 0 then
    if redis.call('SCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
    redis.call('SADD', KEYS[1], ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
USE_GRANT = Script(_USE_GRANT)
RECOUNT = Script(_USE_GRANT, always=True)
"""As USE_GRANT, for leases that are issued already."""

# Reserves for a task and all tasks that it is a part of, or for none of them. A budget of another epoch, and a missing
# one of a task that is older than this epoch, may lack what was used.
# KEYS: budget, begun. ARGV: tokens, when the first task was assigned, until when the budget is kept (both in ms),
#       then for each task: id, limit of tokens, limit of requests ('' for none)
RESERVE = Script(
    """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
local begun = tonumber(redis.call('GET', KEYS[2]) or now)
if epoch ~= expected and (epoch or tonumber(ARGV[2]) < begun) then return {'lost'} end
local wanted = {tokens = tonumber(ARGV[1]), requests = 1}
for i = 4, #ARGV, 3 do
    for j, what in ipairs({'tokens', 'requests'}) do
        local used = tonumber(redis.call('HGET', KEYS[1], ARGV[i] .. ':' .. what) or 0)
        local limit = tonumber(ARGV[i + j])
        if limit and used + wanted[what] > limit then return {'spent', ARGV[i], what, used, limit} end
    end
end
redis.call('HSET', KEYS[1], 'epoch', expected)
for i = 4, #ARGV, 3 do
    redis.call('HINCRBY', KEYS[1], ARGV[i] .. ':tokens', ARGV[1])
    redis.call('HINCRBY', KEYS[1], ARGV[i] .. ':requests', 1)
end
redis.call('PEXPIREAT', KEYS[1], ARGV[3])
return {'reserved'}
"""
)

# Corrects a reservation, unless its budget is gone. KEYS: budget. ARGV: tokens and requests to add, task id...
SETTLE = Script(
    """
if redis.call('HGET', KEYS[1], 'epoch') ~= expected then return 0 end
for i = 3, #ARGV do
    redis.call('HINCRBY', KEYS[1], ARGV[i] .. ':tokens', ARGV[1])
    redis.call('HINCRBY', KEYS[1], ARGV[i] .. ':requests', ARGV[2])
end
return 1
""",
    always=True,
)

# KEYS: live, fences. ARGV: id, selector key...
LOOK = Script(
    RECORDS_LUA
    + """
local before, selector_keys = -1, {unpack(ARGV, 2)}
if #selector_keys > 0 then
    for _, at in ipairs(redis.call('ZMSCORE', KEYS[2], unpack(selector_keys))) do
        if at then before = math.max(before, tonumber(at)) end
    end
end
return {now, record_of(ARGV[1]), redis.call('EXISTS', KEYS[1]), before}
"""
)

# The records of leases. KEYS: none. ARGV: id...
GET = Script(
    RECORDS_LUA
    + """
local found = {}
for i, id in ipairs(ARGV) do found[i] = record_of(id) end
return found
"""
)

# KEYS: epoch, not checked here, live, claimed. ARGV: id.
_HELD = f"""
local guard, id = KEYS[1], ARGV[1]
{RECORDS_LUA}{_DEADLINES}
local _, _, deadline_s = head_of(id)
local due_at = redis.call('ZSCORE', deadlines, id)
local minute = deadline_s and math.floor(deadline_s / 60)
if not due_at and minute and redis.call('SISMEMBER', due .. minute, id) == 1 then
    -- A claim finds a minute only through `minutes`.
    local open_at = redis.call('ZSCORE', minutes, minute)
    if open_at and tonumber(open_at) <= minute * 60000 - {AHEAD_MS} then due_at = deadline_s * 1000 end
end
return {{record_of(id), redis.call('PEXPIRETIME', KEYS[2]), tonumber(due_at or 0), redis.call('ZSCORE', KEYS[3], id),
    redis.call('PEXPIRETIME', ended .. id)}}
"""
# The records of leases. KEYS: epoch, not checked here. ARGV: id...
_RECORDS_OF = f"""
local guard = KEYS[1]
{RECORDS_LUA}
local found = {{}}
for i, id in ipairs(ARGV) do found[i] = record_of(id) end
return found
"""
# KEYS: the agents of a sponsor or user, the leases of an agent. ARGV: the agent.
_COUNTED_WITH = """
return {redis.call('HGET', KEYS[1], ARGV[1]), redis.call('HKEYS', KEYS[2])}
"""
# KEYS: the leases of an agent.
_COUNTED = f"return redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], '{THUMBPRINT}')"
# KEYS: deadlines, claimed, minutes. ARGV: prefix of the minutes' sets (same slot).
_IDS = """
local found = redis.call('ZRANGE', KEYS[1], 0, -1)
local function add(ids) for _, id in ipairs(ids) do found[#found + 1] = id end end
for _, minute in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do add(redis.call('SMEMBERS', ARGV[1] .. minute)) end
add(redis.call('ZRANGE', KEYS[2], 0, -1))
return found
"""


def keys_of_lease(at: Keys, id: bytes) -> Command:
    """A command for the state of one lease.

    It answers the record, when the live key expires (-2: there is none, -1: never), the deadline or 0, until when the
    lease is claimed, and when the record of an ended lease expires.
    """
    return ("EVAL", _HELD, 3, at.epoch, at.live(id), at.claimed, id)


def records_of(at: Keys, ids: Sequence[bytes]) -> Command:
    """A command for the records of leases of a shard, without a check of the epoch."""
    return ("EVAL", _RECORDS_OF, 1, at.epoch, *ids)


def count_and_leases(at: Keys, agents_key: bytes, agent: bytes) -> Command:
    """A command for the count of an agent's leases with a sponsor or user, and the ids of all its leases."""
    return ("EVAL", _COUNTED_WITH, 2, agents_key, at.index_prefix.encode() + agent, agent)


def count_of_agent(at: Keys, agent_id: str) -> Command:
    """A command for the number of an agent's leases that have not ended."""
    return ("EVAL", _COUNTED, 1, at.index(agent_id))


def all_ids(at: Keys) -> Command:
    """A command for the ids of all leases of a shard that have not ended. It is atomic, as leases move between keys."""
    return ("EVAL", _IDS, 3, at.deadlines, at.claimed, at.minutes, at.due_prefix)


# --- ending -----------------------------------------------------------------------------------------------------------

# KEYS: deadlines, claimed, minutes. ARGV: limit, visibility.
CLAIM = Script(
    RECORDS_LUA
    + _DEADLINES
    + """
local limit, visible = tonumber(ARGV[1]), now + ARGV[2]
open(limit)
local ids, due_now = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, limit), {}
if #ids < limit then
    due_now = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, limit - #ids)
    for _, id in ipairs(due_now) do ids[#ids + 1] = id end
end
local claimed, found = {}, {}
for i, text in ipairs(all_stored(ids)) do
    claimed[2 * i - 1], claimed[2 * i] = visible, ids[i]
    found[2 * i - 1], found[2 * i] = ids[i], whole(text)
end
in_parts(claimed, function(...) redis.call('ZADD', KEYS[2], ...) end)
in_parts(due_now, function(...) redis.call('ZREM', KEYS[1], ...) end)
local next = false
for _, key in ipairs(KEYS) do
    local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if first[2] and (not next or tonumber(first[2]) < next) then next = tonumber(first[2]) end
end
return {now, next, found}
""",
    always=True,
)

# Leases whose live key is gone though no record ended them. Anybody may publish that a key expired: a lease is claimed
# only if Redis has no such key, the deadline in its record has come, and no revoker has claimed it. The record is not
# verified here: the revoker does that before it ends the lease.
_EXPIRED = f"""
local function claim_expired(ids, texts, visible)
    local claimed, due_s, over, found = {{}}, {{}}, {{}}, {{}}
    for i, text in ipairs(texts) do
        local status, _, deadline_s = head_in(text)
        if status == 'a' and deadline_s * 1000 <= now
            and redis.call('EXISTS', base .. '{LIVE}' .. ids[i]) == 0
            and not redis.call('ZSCORE', KEYS[1], ids[i])
        then
            over[#over + 1], due_s[#over + 1] = ids[i], deadline_s
            claimed[2 * #over - 1], claimed[2 * #over] = visible, ids[i]
            found[2 * #over - 1], found[2 * #over] = ids[i], whole(text)
        end
    end
    if #over > 0 then
        redis.call('ZADD', KEYS[1], unpack(claimed))
        forget(over, due_s)
    end
    return found
end
"""

# KEYS: claimed. ARGV: visibility, id... (at most a batch)
CLAIM_EXPIRED = Script(
    RECORDS_LUA
    + _DEADLINES
    + _EXPIRED
    + """
local ids = {unpack(ARGV, 2)}
return claim_expired(ids, redis.call('HMGET', leases, unpack(ids)), now + ARGV[1])
""",
    always=True,
)

# The same for a part of all leases, which HSCAN chooses. Answers the next cursor, how many were looked at, and what was
# claimed. KEYS: claimed. ARGV: visibility, cursor, how many.
SCAN_EXPIRED = Script(
    RECORDS_LUA
    + _DEADLINES
    + _EXPIRED
    + """
local cursor, entries = unpack(redis.call('HSCAN', leases, ARGV[2], 'COUNT', ARGV[3]))
local ids, texts = {}, {}
for i = 1, #entries, 2 do ids[#ids + 1], texts[#texts + 1] = entries[i], entries[i + 1] end
return {cursor, #ids, claim_expired(ids, texts, now + ARGV[1])}
""",
    always=True,
)

# KEYS: claimed. ARGV: (id, delay)...
POSTPONE = Script(
    """
for i = 1, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[i + 1], ARGV[i]) end
return {}
""",
    always=True,
)

# The next records of many leases of a shard. If one record of a lease does not follow, the later ones of it fail too.
# KEYS: claimed, outbox, outbox times.
# ARGV: prefixes of live keys, of leases of agents, and of agents of sponsors and users (same slot), how long a lease
#       that has not ended is claimed, how long the record of an ended one is kept,
#       (id, status, seq and epoch of the record that must be there, head of the record, record, outbox field,
#       deadline, agent and two selector keys if terminal, else '' and nothing more)...
TRANSITION = Script(
    RECORDS_LUA
    + _DEADLINES
    + _INDEXES
    + """
local ids, i = {}, 6
while i <= #ARGV do
    ids[#ids + 1] = ARGV[i]
    i = i + (ARGV[i + 5] == '' and 6 or 9)
end
local stored_now = {}
for n, text in ipairs(all_stored(ids)) do stored_now[ids[n]] = text end
local answers, done, due_s, over, claimed, live = {}, {}, {}, {}, {}, {}
local records, times, moved, left = {}, {}, {}, {}
i = 6
for n, id in ipairs(ids) do
    local deadline = ARGV[i + 5]
    local status, seq, deadline_s, epoch = head_in(stored_now[id])
    if status == 'm' then epoch = '' end
    if not status then
        answers[n] = {'unknown'}
    elseif moved[id] or status .. seq .. ' ' .. epoch ~= ARGV[i + 1] then
        moved[id] = true
        answers[n] = {'moved'}
    else
        answers[n] = {'done'}
        stored_now[id] = ARGV[i + 2] .. '\\n'
        done[#done + 1] = id
        due_s[#done] = deadline_s
        live[#live + 1] = ARGV[1] .. id
        if deadline ~= '' then
            over[#over + 1] = id
            store_ended(id, ARGV[i + 2], ARGV[i + 3], math.max(now, tonumber(deadline)) + ARGV[5])
            local agent, a, b = ARGV[i + 6], ARGV[i + 7], ARGV[i + 8]
            local together = agent .. ' ' .. a .. ' ' .. b
            left[together] = left[together] or {{ARGV[2] .. agent, ARGV[3] .. a, ARGV[3] .. b}, {}, agent}
            table.insert(left[together][2], id)
        else
            store(id, ARGV[i + 2], ARGV[i + 3])
            claimed[#claimed + 1] = now + ARGV[4]
            claimed[#claimed + 1] = id
        end
        records[#records + 1] = ARGV[i + 4]
        records[#records + 1] = ARGV[i + 3]
        times[#times + 1] = now
        times[#times + 1] = ARGV[i + 4]
    end
    i = i + (deadline == '' and 6 or 9)
end
if #done > 0 then
    redis.call('UNLINK', unpack(live))
    forget(done, due_s)
    if #claimed > 0 then redis.call('ZADD', KEYS[1], unpack(claimed)) end
    if #over > 0 then
        redis.call('HDEL', leases, unpack(over))
        redis.call('ZREM', KEYS[1], unpack(over))
        for _, some in pairs(left) do leave(unpack(some)) end
    end
    redis.call('HSET', KEYS[2], unpack(records))
    redis.call('ZADD', KEYS[3], unpack(times))
end
for n, id in ipairs(ids) do
    if answers[n][1] == 'moved' then answers[n][2] = record_of(id) end
end
return answers
""",
    always=True,
)

# The seq of each lease that Redis holds, 0 for none. KEYS: none. ARGV: id...
SEQS = Script(
    RECORDS_LUA
    + """
local held = {}
for i, id in ipairs(ARGV) do
    local _, seq = head_of(id)
    held[i] = tonumber(seq or 0)
end
return held
"""
)


# --- the outbox -------------------------------------------------------------------------------------------------------

# KEYS: outbox, outbox times. ARGV: age, limit.
STALE = Script(
    """
local fields = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[1], 'LIMIT', 0, ARGV[2])
local found = {}
for _, field in ipairs(fields) do
    local record = redis.call('HGET', KEYS[1], field)
    if record then
        redis.call('ZADD', KEYS[2], now, field)
        found[#found + 1] = field
        found[#found + 1] = record
    else
        redis.call('ZREM', KEYS[2], field)
    end
end
return found
""",
    always=True,
)


# --- rebuild: the guard is the rebuild's claim ------------------------------------------------------------------------

# KEYS: epoch, spread, begun. ARGV: epoch, number of shards. The claim is given up.
RESUME = Script(
    """
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[3], now)
redis.call('SET', KEYS[1], ARGV[1])
redis.call('DEL', guard)
return {}
""",
    always=True,
)

# KEYS: none. ARGV: none. Deletes the guard: gives up a claim, or has Redis rebuilt if the guard is the epoch.
GIVE_UP = Script(
    """
redis.call('DEL', guard)
return {}
""",
    always=True,
)

# Has Redis rebuilt completely, including keys that exist. The guard is the epoch. KEYS: none. ARGV: none.
REQUEST_FULL_REBUILD = Script(
    f"""
redis.call('SET', guard, '{REBUILD_ALL.decode()}')
return {{}}
""",
    always=True,
)

# One command by the holder of the claim, even if it arrives late. KEYS: key. ARGV: name, rest.
REPAIR = Script(
    """
redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))
return {}
""",
    always=True,
)

# The seq of each lease that Redis holds, 0 for none, a blank, and the epoch of its record, if any. KEYS: none.
# ARGV: how long the claim lasts, id...
COMPARE = Script(
    RECORDS_LUA
    + """
redis.call('PEXPIRE', guard, ARGV[1])
local held = {}
for i = 2, #ARGV do
    local status, seq, _, epoch = head_of(ARGV[i])
    held[#held + 1] = (seq or '0') .. ' ' .. (status ~= 'm' and epoch or '')
end
return held
""",
    always=True,
)

# Records in the outbox up to `done` are on Kafka, or do not count: they are removed.
# KEYS: live, claimed, outbox, outbox times, index...
# ARGV: id, done, status, deadline, head of the record, record, how long a terminal record is kept, else '',
#       how long from now it is claimed if not active, the seq from which on the record there stays, agent,
#       how it is claimed (`NX`: its present claim stays, else `CH`)
RESTORE = Script(
    RECORDS_LUA
    + _DEADLINES
    + _INDEXES
    + """
local id = ARGV[1]
local _, seq = head_of(id)
if seq and tonumber(seq) >= tonumber(ARGV[9]) then return 0 end
for seq = 1, ARGV[2] do
    redis.call('HDEL', KEYS[3], id .. ':' .. seq)
    redis.call('ZREM', KEYS[4], id .. ':' .. seq)
end
local deadline = tonumber(ARGV[4])
if ARGV[3] ~= 'active' then redis.call('DEL', KEYS[1]) end
forget({id}, {deadline / 1000})
if ARGV[7] ~= '' then
    store_ended(id, ARGV[5], ARGV[6], deadline + ARGV[7])
    redis.call('HDEL', leases, id)
    redis.call('ZREM', KEYS[2], id)
    leave({unpack(KEYS, 5)}, {id}, ARGV[10])
    return 1
end
store(id, ARGV[5], ARGV[6])
redis.call('DEL', ended .. id)
enter({unpack(KEYS, 5)}, id, ARGV[10])
if ARGV[3] == 'active' then
    if deadline > now then redis.call('SET', KEYS[1], '', 'PXAT', deadline) end
    await(id, deadline)
    redis.call('ZREM', KEYS[2], id)
else
    redis.call('ZADD', KEYS[2], ARGV[11], now + ARGV[8], id)
end
return 1
""",
    always=True,
)

# Put these records into the outbox, unless they are there. KEYS: outbox, outbox times.
# ARGV: (outbox field, record)...
QUEUE = Script(
    """
for i = 1, #ARGV, 2 do
    redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
    redis.call('ZADD', KEYS[2], 0, ARGV[i])
end
return {}
""",
    always=True,
)

SCRIPTS = (
    PREPARE, CLOSE, ACTIVATE, USE_GRANT, RECOUNT, LOOK, GET, CLAIM, CLAIM_EXPIRED, SCAN_EXPIRED, POSTPONE, TRANSITION,
    SEQS, STALE, RESTORE,
)  # fmt: skip
