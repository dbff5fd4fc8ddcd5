"""The registry's scripts.

Keys, all with one hash tag so that they lie in one slot of a Cluster (`NS` is `{namespace}`):

    NS:d           hash  id -> descriptor
    NS:m           hash  id -> producer, host, bytes, order, fence, joined by tabs; fence 0: ready
    NS:lease       zset  id by the end of its publication's lease, ms
    NS:claim       zset  id by the end of its claim's lease, ms
    NS:ready       zset  id by order of publication
    NS:own:HOST    zset  the same for one host; claims by others are removed from it when met
    NS:seq         the last order or fence given out; begins with the time in microseconds, so that
                   after the keys were lost no old fence fits a new claim
    NS:ended:WHO   list  id, kind, reason, joined by tabs, of one producer

KEYS[1..6] are the first six; KEYS[7] is the one of the host or producer that the call is about.
What expires or is put back may belong to other hosts and producers: their keys are named in the
script, with the same tag, hence in the same slot.

A sweep does at most 512 things, so that no call holds the server up. Correctness does not hang on
it: a lease is looked at wherever it counts. Time is the server's clock; one that jumps makes leases
longer or shorter, which fences and the proofs after a read make harmless.
"""

from __future__ import annotations

_COMMON = """
local D, M, LEASE, CLAIM, READY, SEQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local NS = string.sub(D, 1, -3)
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
local function offer(id, m)
  m.fence = 0
  put(id, m)
  redis.call('ZREM', CLAIM, id)
  redis.call('ZADD', READY, m.order, id)
  redis.call('ZADD', NS .. ':own:' .. m.host, m.order, id)
end
local function forget(id, m)
  redis.call('HDEL', D, id)
  redis.call('HDEL', M, id)
  redis.call('ZREM', LEASE, id)
  redis.call('ZREM', CLAIM, id)
  redis.call('ZREM', READY, id)
  redis.call('ZREM', NS .. ':own:' .. m.host, id)
end
local function finish(id, m, kind, reason)
  forget(id, m)
  local list = NS .. ':ended:' .. m.producer
  redis.call('RPUSH', list, table.concat({id, kind, reason}, '\\t'))
  redis.call('PEXPIRE', list, 3600000)
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

# ARGV: lease ms, most, bytes. Returns id, fence, bytes, descriptor, …
CLAIM = (
    _COMMON
    + """
sweep()
local most, room, found = tonumber(ARGV[2]), tonumber(ARGV[3]), {}
for pass = 1, 2 do
  local set = pass == 1 and KEYS[7] or READY
  while #found / 4 < most do
    local ids = redis.call('ZRANGE', set, 0, math.min(63, most - #found / 4 - 1))
    if #ids == 0 then break end
    local full = false
    for _, id in ipairs(ids) do
      local m = meta(id)
      if not m or m.fence ~= 0 then
        redis.call('ZREM', set, id)
      elseif over(LEASE, id) then
        finish(id, m, 'expired', 'lease expired')
      elseif #found > 0 and m.bytes > room then
        full = true
        break
      else
        room = room - m.bytes
        m.fence = next_number()
        put(id, m)
        redis.call('ZREM', READY, id)
        redis.call('ZREM', KEYS[7], id)
        redis.call('ZADD', CLAIM, now + ARGV[1], id)
        found[#found + 1] = id
        found[#found + 1] = m.fence
        found[#found + 1] = m.bytes
        found[#found + 1] = redis.call('HGET', D, id)
      end
    end
    if full then return found end
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

# KEYS[7]: the producer's ended list; ARGV: producer, then ids. Returns those that are nowhere
MISSING = (
    _COMMON
    + """
local ended = {}
for _, text in ipairs(redis.call('LRANGE', KEYS[7], 0, -1)) do
  ended[string.match(text, '^[^\\t]*')] = true
end
local gone = {}
for i = 2, #ARGV do
  local m = meta(ARGV[i])
  if not (m and m.producer == ARGV[1]) and not ended[ARGV[i]] then gone[#gone + 1] = ARGV[i] end
end
return gone
"""
)

SWEEP = _COMMON + "return sweep()"
