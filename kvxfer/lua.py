"""The registry's scripts.

Every key that a script touches is passed to it, and all have one hash tag, so that they lie in one
slot of a Cluster (`NS` is `{namespace}`):

    NS:d           hash  id -> descriptor
    NS:m           hash  id -> producer, host, bytes, order, fence, joined by tabs; fence 0: ready
    NS:lease       zset  id by the end of its publication's lease, ms
    NS:claim       zset  id by the end of its claim's lease, ms
    NS:ready       zset  id by order of publication
    NS:own         zset  host, order, id of what is ready, joined by tabs; in order of the bytes
    NS:seq         the last order or fence given out; begins with the time in microseconds, so that
                   after the keys were lost no old fence fits a new claim
    NS:gone        hash  id -> producer, kind, reason, time in ms, joined by tabs: ended by a call
                   that was not given the producer's list (a sweep knows no producers)
    NS:ended:WHO   list  id, kind, reason, joined by tabs, of one producer

KEYS[1..8] are the first eight; from KEYS[9] on come the lists of the producers that the call is
about. A producer collects from its list, which wakes it, and from `gone`. What nobody collects is
forgotten after an hour.

A sweep does at most 512 things, so that no call holds the server up. Correctness does not hang on
it: a lease is looked at wherever it counts. Time is the server's clock; one that jumps makes leases
longer or shorter, which fences and the proofs after a read make harmless.
"""

from __future__ import annotations

_COMMON = """
local D, M, LEASE, CLAIM, READY, SEQ, OWN, GONE = unpack(KEYS, 1, 8)
local KEEP_MS = 3600000
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function meta(id)
  local text = redis.call('HGET', M, id)
  if not text then return nil end
  local p, h, b, o, f = string.match(text, '^([^\\t]*)\\t([^\\t]*)\\t(%d+)\\t(%d+)\\t(%d+)$')
  return {producer=p, host=h, bytes=tonumber(b), order=tonumber(o), fence=tonumber(f)}
end
local function put(id, m)
  redis.call('HSET', M, id, table.concat({m.producer, m.host, string.format('%d', m.bytes),
    string.format('%d', m.order), string.format('%d', m.fence)}, '\\t'))
end
local function next_number()
  local n = redis.call('INCR', SEQ)
  if n > 1 then return n end
  n = t[1] * 1000000 + t[2]
  redis.call('SET', SEQ, string.format('%d', n))
  return n
end
local function of_host(id, m)
  return table.concat({m.host, string.format('%016d', m.order), id}, '\\t')
end
local function offer(id, m)
  m.fence = 0
  put(id, m)
  redis.call('ZREM', CLAIM, id)
  redis.call('ZADD', READY, m.order, id)
  redis.call('ZADD', OWN, 0, of_host(id, m))
end
local function forget(id, m)
  redis.call('HDEL', D, id)
  redis.call('HDEL', M, id)
  redis.call('ZREM', LEASE, id)
  if m.fence ~= 0 then
    redis.call('ZREM', CLAIM, id)
  else
    redis.call('ZREM', READY, id)
    redis.call('ZREM', OWN, of_host(id, m))
  end
end
local lists, kept = {}, {}
for i = 9, #KEYS do lists[string.match(KEYS[i], '}:ended:(.*)$')] = KEYS[i] end
local function finish(id, m, kind, reason)
  forget(id, m)
  local list = lists[m.producer]
  if list then
    redis.call('RPUSH', list, id .. '\\t' .. kind .. '\\t' .. reason)
  else
    redis.call('HSET', GONE, id,
      table.concat({m.producer, kind, reason, string.format('%d', now)}, '\\t'))
  end
  local key = list or GONE
  if not kept[key] then
    redis.call('PEXPIRE', key, KEEP_MS)
    kept[key] = true
  end
end
local function gone_of(producer)
  local found = {}
  if redis.call('EXISTS', GONE) == 0 then return found end
  local all = redis.call('HGETALL', GONE)
  for i = 1, #all, 2 do
    local p, kind, reason, at = string.match(all[i + 1], '^([^\\t]*)\\t(%a+)\\t(.*)\\t(%d+)$')
    if p == producer then
      found[#found + 1] = {all[i], kind, reason}
    elseif tonumber(at) < now - KEEP_MS then
      redis.call('HDEL', GONE, all[i])
    end
  end
  return found
end
local function over(set, id)
  local until_ms = redis.call('ZSCORE', set, id)
  return not until_ms or tonumber(until_ms) <= now
end
local function owned(id, fence)
  local m = meta(id)
  if m and m.fence ~= 0 and m.fence == tonumber(fence) and not over(CLAIM, id) then return m end
  return nil
end
local function sweep()
  local count = 0
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASE, '-inf', now, 'LIMIT', 0, 256)) do
    local m = meta(id)
    if m then finish(id, m, 'expired', 'lease expired') else redis.call('ZREM', LEASE, id) end
    count = count + 1
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', CLAIM, '-inf', now, 'LIMIT', 0, 256)) do
    local m = meta(id)
    if m then offer(id, m) else redis.call('ZREM', CLAIM, id) end
    count = count + 1
  end
  return count
end
"""

# ARGV: lease ms, then id, producer, host, bytes, descriptor for each
PUBLISH = (
    _COMMON
    + """
for i = 2, #ARGV, 5 do
  local id = ARGV[i]
  if redis.call('HEXISTS', M, id) == 0 then
    redis.call('HSET', D, id, ARGV[i + 4])
    offer(id, {producer=ARGV[i + 1], host=ARGV[i + 2], bytes=tonumber(ARGV[i + 3]),
      order=next_number(), fence=0})
  end
  redis.call('ZADD', LEASE, now + ARGV[1], id)
end
return 1
"""
)

# ARGV: lease ms, most, bytes, host. Returns id, fence, bytes, descriptor, producer, …
CLAIM = (
    _COMMON
    + """
sweep()
local most, room, found, count = tonumber(ARGV[2]), tonumber(ARGV[3]), {}, 0
local function take(id, entry)
  local m = meta(id)
  if not m or m.fence ~= 0 then
    redis.call('ZREM', READY, id)
    return true
  end
  if over(LEASE, id) then
    finish(id, m, 'expired', 'lease expired')
    return true
  end
  if count > 0 and m.bytes > room then return false end
  room, count = room - m.bytes, count + 1
  redis.call('ZREM', READY, id)
  if not entry then redis.call('ZREM', OWN, of_host(id, m)) end
  m.fence = next_number()
  put(id, m)
  redis.call('ZADD', CLAIM, now + ARGV[1], id)
  local i = 5 * count
  found[i - 4], found[i - 3], found[i - 2] = id, m.fence, m.bytes
  found[i - 1], found[i] = redis.call('HGET', D, id), m.producer
  return true
end
local first, last = '[' .. ARGV[4] .. '\\t', '(' .. ARGV[4] .. '\\n'
while count < most do
  local own = redis.call('ZRANGEBYLEX', OWN, first, last, 'LIMIT', 0, math.min(64, most - count))
  if #own == 0 then break end
  for _, entry in ipairs(own) do
    if not take(string.match(entry, '^[^\\t]*\\t%d+\\t(.*)$'), entry) then return found end
    redis.call('ZREM', OWN, entry)
  end
end
while count < most do
  local ids = redis.call('ZRANGE', READY, 0, math.min(64, most - count) - 1)
  if #ids == 0 then break end
  for _, id in ipairs(ids) do
    if not take(id) then return found end
  end
end
return found
"""
)

# ARGV: lease ms, then id, fence for each. Returns the lost ids
RENEW = (
    _COMMON
    + """
sweep()
local lost = {}
for i = 2, #ARGV, 2 do
  if owned(ARGV[i], ARGV[i + 1]) then
    redis.call('ZADD', CLAIM, now + ARGV[1], ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)

# ARGV: kind, reason, then id, fence for each. Returns the refused ids
END = (
    _COMMON
    + """
sweep()
local refused = {}
for i = 3, #ARGV, 2 do
  local m = owned(ARGV[i], ARGV[i + 1])
  if m then
    finish(ARGV[i], m, ARGV[1], ARGV[2])
  else
    refused[#refused + 1] = ARGV[i]
  end
end
return refused
"""
)

# ARGV: lease ms, producer, then ids. Returns the unknown ids
RENEW_PUBLISHED = (
    _COMMON
    + """
sweep()
local unknown = {}
for i = 3, #ARGV do
  local m = meta(ARGV[i])
  if m and m.producer == ARGV[2] then
    redis.call('ZADD', LEASE, now + ARGV[1], ARGV[i])
  else
    unknown[#unknown + 1] = ARGV[i]
  end
end
return unknown
"""
)

# ARGV: producer, then ids
WITHDRAW = (
    _COMMON
    + """
for i = 2, #ARGV do
  local m = meta(ARGV[i])
  if m and m.producer == ARGV[1] then forget(ARGV[i], m) end
end
return 1
"""
)

# KEYS[9]: the producer's list; ARGV: producer, then ids. Returns those that are nowhere
MISSING = (
    _COMMON
    + """
local ended = {}
for _, text in ipairs(redis.call('LRANGE', KEYS[9], 0, -1)) do
  ended[string.match(text, '^[^\\t]*')] = true
end
for _, entry in ipairs(gone_of(ARGV[1])) do ended[entry[1]] = true end
local nowhere = {}
for i = 2, #ARGV do
  local m = meta(ARGV[i])
  if not (m and m.producer == ARGV[1]) and not ended[ARGV[i]] then
    nowhere[#nowhere + 1] = ARGV[i]
  end
end
return nowhere
"""
)

# KEYS[9]: the producer's list; ARGV: producer, most of the list. Returns id, kind, reason, by tabs
COLLECT = (
    _COMMON
    + """
sweep()
local found = redis.call('LPOP', KEYS[9], ARGV[2]) or {}
for _, entry in ipairs(gone_of(ARGV[1])) do
  redis.call('HDEL', GONE, entry[1])
  found[#found + 1] = table.concat(entry, '\\t')
end
return found
"""
)

SWEEP = _COMMON + "return sweep()"
