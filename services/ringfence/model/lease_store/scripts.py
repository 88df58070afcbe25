"""The Lua scripts of the lease store: each is one step, whole or not at all, by Redis's own clock.

The last key of each is the epoch of the shard, the last argument what it must be: on a Redis that has forgotten leases,
or may have, nothing is done. In the scripts of a rebuild it is the claim of who rebuilds instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

Argument = str | bytes | int
Command = tuple[Argument, ...]

LOST = "LOST"
"""How the error begins that a script answers with where the epoch is another."""

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

# A lease among those of its agent (keys[1], a set), and its agent among those of its sponsor and user (the other keys,
# hashes), by the number of its leases there.
_INDEXES = """
local function enter(keys, id, agent)
    if redis.call('SADD', keys[1], id) == 0 then return end
    for i = 2, #keys do redis.call('HINCRBY', keys[i], agent, 1) end
end
local function leave(keys, id, agent)
    if redis.call('SREM', keys[1], id) == 0 then return end
    for i = 2, #keys do
        if redis.call('HINCRBY', keys[i], agent, -1) <= 0 then redis.call('HDEL', keys[i], agent) end
    end
end
"""


class Script:
    """One script, and the name that Redis knows it by.

    Redis that is full (`maxmemory`, `noeviction`) refuses scripts that write. Those that end leases, and by that make
    room, it does `always`.
    """

    def __init__(self, text: str, *, always: bool = False) -> None:
        self.text = (_ALWAYS if always else "") + _GUARD + _NOW + text
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


def always(name: str, key: str | bytes, *args: Argument) -> Command:
    """A command on one key that Redis carries out even where it is full."""
    return ("EVAL", _COMMAND, 1, key, name, *args)


_FENCE = f"""{_ALWAYS}{_NOW}
redis.call('ZADD', KEYS[1], 'GT', unpack(ARGV, 2))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
return now
"""


def fencing(fences: str, marks: Mapping[str, int], keep_ms: int) -> list[Command]:
    """What puts fences (mark: `issued_before` in ms) into a shard, even where Redis is full. It answers when, in ms.

    Those that can cover nothing more, `keep_ms` older than the newest, go.
    """
    if not marks:
        return []
    scored = [part for mark, before_ms in marks.items() for part in (before_ms, mark)]
    return [("EVAL", _FENCE, 1, fences, max(marks.values()) - keep_ms, *scored)]


# --- issuing ----------------------------------------------------------------------------------------------------------

# Whether fences or time forbid to issue what the script is about. Of ARGV: 2 deadline, 3 requested at,
# 7 least time left, 11... marks.
_FORBIDDEN = """
local function forbidden(fences)
    local marks = {unpack(ARGV, 11)}
    for i, before in ipairs(redis.call('ZMSCORE', fences, unpack(marks))) do
        if before and tonumber(before) >= tonumber(ARGV[3]) then return {'fenced', marks[i]} end
    end
    if ARGV[2] - now < tonumber(ARGV[7]) then return {'late'} end
end
"""

# KEYS: record, claimed, outbox, outbox times, fences, index...
# ARGV: id, deadline, requested at, head of the record, record, outbox field, least time left, token, time to mint,
#       agent, mark...
_PREPARE = (
    _INDEXES
    + _FORBIDDEN
    + """
local known = redis.call('GET', KEYS[1])
local head, token, signed = string.match(known or '', '^(minting %d+ %d+) (%S+)\\n(.*)')
if known and (not head or token == '!' and ARGV[8] ~= token) then return {'known', known} end
local no = forbidden(KEYS[5])
if no then return no end
redis.call('ZADD', KEYS[2], now + ARGV[9], ARGV[1])
if known then
    known = head .. ' ' .. ARGV[8] .. '\\n' .. signed
    redis.call('SET', KEYS[1], known)
    return {'prepared', known}
end
redis.call('SET', KEYS[1], ARGV[4] .. ' ' .. ARGV[8] .. '\\n' .. ARGV[5])
redis.call('HSET', KEYS[3], ARGV[6], ARGV[5])
redis.call('ZADD', KEYS[4], now, ARGV[6])
enter({unpack(KEYS, 6)}, ARGV[1], ARGV[10])
return {'prepared'}
"""
)
PREPARE = Script(_PREPARE)
CLOSE = Script(_PREPARE, always=True)
"""The same by a revoker that shuts the issuer out."""

# KEYS: record, live, deadlines, claimed, outbox, outbox times, fences, index...
# ARGV: id, deadline, requested at, head of the record, record, outbox field, least time left,
#       token that the `minting` record must bear, else '', seq of that, agent, mark...
ACTIVATE = Script(
    _INDEXES
    + _FORBIDDEN
    + """
local known, record = redis.call('GET', KEYS[1]), ARGV[4] .. '\\n' .. ARGV[5]
if ARGV[8] ~= '' then
    if known == record then return {'activated'} end
    if not known then return {'lost'} end
    local seq, token = string.match(known, '^minting (%d+) %d+ (%S+)')
    if token ~= ARGV[8] or seq ~= ARGV[9] then return {'lost', known} end
elseif known then
    return {'known', known}
end
local no = forbidden(KEYS[7])
if no then return no end
redis.call('SET', KEYS[1], record)
redis.call('SET', KEYS[2], '', 'PXAT', ARGV[2])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[5], ARGV[6], ARGV[5])
redis.call('ZADD', KEYS[6], now, ARGV[6])
enter({unpack(KEYS, 8)}, ARGV[1], ARGV[10])
return {'activated'}
"""
)

# KEYS: uses of a grant. ARGV: id of the lease that names it, how many may, how long that is remembered.
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
"""The same for what is issued already."""

# KEYS: record, live, fences. ARGV: mark...
LOOK = Script("""
local before = -1
if #ARGV > 0 then
    for _, at in ipairs(redis.call('ZMSCORE', KEYS[3], unpack(ARGV))) do
        if at then before = math.max(before, tonumber(at)) end
    end
end
return {now, redis.call('GET', KEYS[1]), redis.call('EXISTS', KEYS[2]), before}
""")


# --- ending -----------------------------------------------------------------------------------------------------------

# KEYS: deadlines, claimed. ARGV: limit, visibility, prefix of record keys (same slot).
CLAIM = Script(
    """
local limit, visible = tonumber(ARGV[1]), now + ARGV[2]
local ids = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, limit)
if #ids < limit then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, limit - #ids)) do
        redis.call('ZREM', KEYS[1], id)
        ids[#ids + 1] = id
    end
end
local found = {}
for _, id in ipairs(ids) do
    redis.call('ZADD', KEYS[2], visible, id)
    found[#found + 1] = id
    found[#found + 1] = redis.call('GET', ARGV[3] .. id)
end
local next = false
for _, key in ipairs(KEYS) do
    local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if first[2] and (not next or tonumber(first[2]) < next) then next = tonumber(first[2]) end
end
return {now, next, found}
""",
    always=True,
)

# KEYS: deadlines. ARGV: within how long.
COUNT_DUE = Script("return redis.call('ZCOUNT', KEYS[1], now, now + ARGV[1])")

# KEYS: deadlines. ARGV: a deadline, how many with this one to pass over, within how long, limit, prefix of record keys.
DUE_AFTER = Script("""
local last, passed = tonumber(ARGV[1]), tonumber(ARGV[2])
if last < now then last, passed = now, 0 end
local found = redis.call(
    'ZRANGEBYSCORE', KEYS[1], last, now + ARGV[3], 'WITHSCORES', 'LIMIT', passed, ARGV[4])
local records = {}
for i = 1, #found, 2 do
    local deadline = tonumber(found[i + 1])
    if deadline > last then last, passed = deadline, 0 end
    passed = passed + 1
    records[#records + 1] = redis.call('GET', ARGV[5] .. found[i])
end
return {last, passed, records}
""")

# KEYS: claimed. ARGV: (id, delay)...
POSTPONE = Script(
    """
for i = 1, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[i + 1], ARGV[i]) end
return {}
""",
    always=True,
)

# The next records of many leases of a shard. Where one of a lease does not follow, none that come after it do.
# KEYS: deadlines, claimed, outbox, outbox times.
# ARGV: prefixes of records, live keys, leases of agents and agents of marks (same slot), how long a lease that has not
#       ended is claimed, how long the record of one that has is kept,
#       (id, status, seq and epoch of the record that is expected there, head of the record, record, outbox field,
#       deadline, agent and two marks if terminal, else '' and nothing more)...
TRANSITION = Script(
    _INDEXES
    + """
local answers, done, over, claimed, live = {}, {}, {}, {}, {}
local records, times, moved = {}, {}, {}
local i = 7
while i <= #ARGV do
    local id, deadline = ARGV[i], ARGV[i + 5]
    local key = ARGV[1] .. id
    local head = redis.call('GETRANGE', key, 0, 63)
    local status, seq, epoch = string.match(head, '^(%a+) (%d+) %d+ ?([^\\n]*)')
    if status == 'minting' then epoch = '' end
    if not status then
        answers[#answers + 1] = {'unknown'}
    elseif moved[id] or status .. ' ' .. seq .. ' ' .. epoch ~= ARGV[i + 1] then
        moved[id] = true
        answers[#answers + 1] = {'moved', redis.call('GET', key)}
    else
        answers[#answers + 1] = {'done'}
        done[#done + 1] = id
        live[#live + 1] = ARGV[2] .. id
        local record = ARGV[i + 2] .. '\\n' .. ARGV[i + 3]
        if deadline ~= '' then
            over[#over + 1] = id
            redis.call('SET', key, record, 'PXAT', math.max(now, tonumber(deadline)) + ARGV[6])
            local keys = {ARGV[3] .. ARGV[i + 6]}
            for n = 7, 8 do keys[#keys + 1] = ARGV[4] .. ARGV[i + n] end
            leave(keys, id, ARGV[i + 6])
        else
            redis.call('SET', key, record)
            claimed[#claimed + 1] = now + ARGV[5]
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
    redis.call('ZREM', KEYS[1], unpack(done))
    if #claimed > 0 then redis.call('ZADD', KEYS[2], unpack(claimed)) end
    if #over > 0 then redis.call('ZREM', KEYS[2], unpack(over)) end
    redis.call('HSET', KEYS[3], unpack(records))
    redis.call('ZADD', KEYS[4], unpack(times))
end
return answers
""",
    always=True,
)

# The seq of each lease that Redis holds, 0 for none. KEYS: none. ARGV: prefix of record keys (same slot), id...
SEQS = Script("""
local held = {}
for i = 2, #ARGV do
    local known = redis.call('GETRANGE', ARGV[1] .. ARGV[i], 0, 48)
    held[#held + 1] = tonumber(string.match(known, '^%a+ (%d+) ') or 0)
end
return held
""")


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


# --- restoring: in a rebuild, the guard is the claim of who rebuilds --------------------------------------------------

# KEYS: epoch. ARGV: epoch. The claim is given up.
RESUME = Script(
    """
redis.call('SET', KEYS[1], ARGV[1])
redis.call('DEL', guard)
return {}
""",
    always=True,
)

# KEYS: none. ARGV: none. The claim is given up, and nothing is said of the shard.
GIVE_UP = Script(
    """
redis.call('DEL', guard)
return {}
""",
    always=True,
)

# The seq of each lease that Redis holds, 0 for none, a blank, and the epoch of its record, if any. KEYS: none.
# ARGV: how long the claim lasts, prefix of record keys (same slot), id...
COMPARE = Script(
    """
redis.call('PEXPIRE', guard, ARGV[1])
local held = {}
for i = 3, #ARGV do
    local known = redis.call('GETRANGE', ARGV[2] .. ARGV[i], 0, 63)
    local status, seq, epoch = string.match(known, '^(%a+) (%d+) %d+ ?([^\\n]*)')
    held[#held + 1] = (seq or '0') .. ' ' .. (status ~= 'minting' and epoch or '')
end
return held
""",
    always=True,
)

# What lies in the outbox up to `done` is on Kafka, or counts for nothing.
# KEYS: record, live, deadlines, claimed, outbox, outbox times, index...
# ARGV: id, done, status, deadline, head of the record, record, how long a terminal record is kept, else '',
#       when a claimed one is due, from now, the seq from which on what is there stays as it is, agent
RESTORE = Script(
    _INDEXES
    + """
local known = redis.call('GET', KEYS[1])
if known and tonumber(string.match(known, '^%a+ (%d+) ')) >= tonumber(ARGV[9]) then return 0 end
for seq = 1, ARGV[2] do
    redis.call('HDEL', KEYS[5], ARGV[1] .. ':' .. seq)
    redis.call('ZREM', KEYS[6], ARGV[1] .. ':' .. seq)
end
local deadline = tonumber(ARGV[4])
redis.call('SET', KEYS[1], ARGV[5] .. '\\n' .. ARGV[6])
if ARGV[7] ~= '' then
    redis.call('PEXPIREAT', KEYS[1], deadline + ARGV[7])
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[3], ARGV[1])
    redis.call('ZREM', KEYS[4], ARGV[1])
    leave({unpack(KEYS, 7)}, ARGV[1], ARGV[10])
    return 1
end
enter({unpack(KEYS, 7)}, ARGV[1], ARGV[10])
if ARGV[3] == 'active' then
    if deadline > now then redis.call('SET', KEYS[2], '', 'PXAT', deadline) end
    redis.call('ZADD', KEYS[3], deadline, ARGV[1])
    redis.call('ZREM', KEYS[4], ARGV[1])
else
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[3], ARGV[1])
    redis.call('ZADD', KEYS[4], now + ARGV[8], ARGV[1])
end
return 1
""",
    always=True,
)

# Have these records published, where they do not wait for it already. KEYS: outbox, outbox times.
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
    PREPARE, CLOSE, ACTIVATE, USE_GRANT, RECOUNT, LOOK, CLAIM, COUNT_DUE, DUE_AFTER, POSTPONE, TRANSITION, SEQS, STALE,
    RESTORE,
)  # fmt: skip
"""What every service runs."""
