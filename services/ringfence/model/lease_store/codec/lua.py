"""Lua half of the codec: how scripts store packed records, and restore them.

The stored form leaves out of a packed record what many records of a shard have in common (ADR 0017):

- Who signed it: a hash of the shard (`signers`) maps each signer to a number of one byte, and the record has that byte.
- The thumbprint of the agent's key, in `STORED_SHORT`: it stands once with the leases of the agent.
- The head of an active record: status, `seq` and deadline stand in the record as well.

Only scripts see the stored form. `record_of` and `whole` return head and record as they were written. If a part that
was left out of the record is gone, they return the head alone. Such a record does not verify, and a rebuild restores
it.
"""

from __future__ import annotations

from ringfence.model.lease_store.codec.records import (
    ACTIVE,
    BEFORE_AGENT,
    BOUND,
    FIELDS,
    STATE_BYTES,
    THUMBPRINT_BYTES,
)
from ringfence.model.lease_store.keys import BY_AGENT, ENDED, LEASES, SIGNERS, THUMBPRINT

STORED, STORED_SHORT = 4, 5
"""The first byte of a record in stored form; `STORED_SHORT`: without the thumbprint of the agent's key."""
_MAX_SIGNERS = 255
MAX_LUA_ARGUMENTS = 1000
"""How many arguments one command gets in Lua: some thousand more do not fit on its stack."""

# `guard`, a key of the shard, gives the names of the others. Records of leases that have not ended are fields of one
# hash; those of ended leases are keys of their own, as they expire one by one.
# `record_of`, `whole`: see above. `head_of`: status, seq, deadline in s, epoch or token.
# Whoever stores a record as ended (`store_ended`) removes it from `leases`.
RECORDS_LUA = f"""
local base = string.match(guard, '^.*:')
local leases, ended = base .. '{LEASES}', base .. '{ENDED}'
local signers, by_agent = base .. '{SIGNERS}', base .. '{BY_AGENT}'
local by_number, numbers = {{}}, {{}}
local function stored(id) return redis.call('HGET', leases, id) or redis.call('GET', ended .. id) end
local function is_headless(text)
    local first = string.byte(text, 1)
    return first == {STORED} or first == {STORED_SHORT}
end
local function state_of(text, at)
    local status, seq, a, b, c, d, flags = string.byte(text, at, at + {STATE_BYTES} - 1)
    return status, seq, ((a * 256 + b) * 256 + c) * 256 + d, flags
end
local function agent_of(after)
    return string.match(after, '^([^%z]*)', {STATE_BYTES + BEFORE_AGENT} + 1)
end
local function whole(text)
    if not text then return text end
    local head, at
    if is_headless(text) then
        local _, seq, deadline_s = state_of(text, 3)
        head, at = string.format('a%d %d', seq, deadline_s), 1
    else
        at = string.find(text, '\\n', 1, true) + 1
        head = string.sub(text, 1, at - 2)
    end
    local form = string.byte(text, at)
    if form ~= {STORED} and form ~= {STORED_SHORT} then return text end
    local number, after = string.sub(text, at + 1, at + 1), string.sub(text, at + 2)
    local signer = by_number[number] or redis.call('HGET', signers, number)
    local thumbprint = ''
    if form == {STORED_SHORT} then thumbprint = redis.call('HGET', by_agent .. agent_of(after), '{THUMBPRINT}') end
    if not signer or not thumbprint then return head .. '\\n' end
    by_number[number] = signer
    return head .. '\\n' .. string.char({FIELDS}, #signer) .. signer
        .. string.sub(after, 1, {STATE_BYTES}) .. thumbprint .. string.sub(after, {STATE_BYTES} + 1)
end
local function record_of(id) return whole(stored(id)) end
local function all_stored(ids)
    local found = {{}}
    for first = 1, #ids, {MAX_LUA_ARGUMENTS} do
        local last = math.min(first + {MAX_LUA_ARGUMENTS - 1}, #ids)
        for i, text in ipairs(redis.call('HMGET', leases, unpack(ids, first, last))) do
            found[first + i - 1] = text or redis.call('GET', ended .. ids[first + i - 1])
        end
    end
    return found
end
local function head_in(text)
    if not text then return end
    if is_headless(text) then
        local _, seq, deadline_s = state_of(text, 3)
        return 'a', seq, deadline_s, ''
    end
    return string.match(text, '^(%a)(%d+) (%d+) ?([^\\n]*)\\n')
end
local function head_of(id) return head_in(stored(id)) end
local function number_of(signer)
    local number = numbers[signer] or redis.call('HGET', signers, signer)
    if not number then
        -- Some signers may have been deleted: no number in use is given to another signer.
        local free = math.floor(redis.call('HLEN', signers) / 2) + 1
        while free <= {_MAX_SIGNERS} and redis.call('HEXISTS', signers, string.char(free)) == 1 do free = free + 1 end
        if free > {_MAX_SIGNERS} then return end
        number = string.char(free)
        redis.call('HSET', signers, signer, number, number, signer)
    end
    numbers[signer] = number
    return number
end
local function compact(head, record)
    if string.byte(record, 1) ~= {FIELDS} then return head .. '\\n' .. record end
    local size = string.byte(record, 2)
    local number, after = number_of(string.sub(record, 3, 2 + size)), string.sub(record, 3 + size)
    if not number then return head .. '\\n' .. record end
    return head .. '\\n' .. string.char({STORED}) .. number .. after, number, after
end
local function compact_active(head, record)
    local text, number, after = compact(head, record)
    if not number then return text end
    local status, seq, deadline_s, flags = state_of(after, 1)
    if status ~= {ACTIVE} or head ~= string.format('a%d %d', seq, deadline_s) then return text end
    if bit.band(flags, {BOUND}) ~= 0 then
        local thumbprint = string.sub(after, {STATE_BYTES} + 1, {STATE_BYTES + THUMBPRINT_BYTES})
        local short = string.sub(after, 1, {STATE_BYTES}) .. string.sub(after, {STATE_BYTES + THUMBPRINT_BYTES} + 1)
        local key = by_agent .. agent_of(short)
        redis.call('HSETNX', key, '{THUMBPRINT}', thumbprint)
        if redis.call('HGET', key, '{THUMBPRINT}') == thumbprint then
            return string.char({STORED_SHORT}) .. number .. short
        end
    end
    return string.char({STORED}) .. number .. after
end
local function store(id, head, record) redis.call('HSET', leases, id, compact_active(head, record)) end
local function store_ended(id, head, record, until_ms)
    redis.call('SET', ended .. id, (compact(head, record)), 'PXAT', until_ms)
end
"""
