"""The registry's scripts.

Keys, all with one hash tag so that they lie in one slot of a Cluster (`NS` is `{namespace}`):

    NS:d           hash  id -> descriptor
    NS:m           hash  id -> producer, host, bytes, order, fence, joined by tabs; fence 0: ready
    NS:lease       zset  id by the end of its publication's lease, ms
    NS:claim       zset  id by the end of its claim's lease, ms
    NS:ready       zset  id by order of publication
    NS:own:HOST    zset  the same for one host; claims by others are removed from it when met
    NS:seq         the last order or fence given out
    NS:ended:WHO   list  id, kind, reason, joined by tabs, of one producer

KEYS[1..6] are the first six; KEYS[7] is the one of the host or producer that the call is about.
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

# ARGV: lease ms, producer, host, then id, bytes, descriptor for each
PUBLISH = (
    _COMMON
    + """
for i = 4, #ARGV, 3 do
  local id = ARGV[i]
  if redis.call('HEXISTS', M, id) == 0 then
    redis.call('HSET', D, id, ARGV[i + 2])
    offer(id, {producer=ARGV[2], host=ARGV[3], bytes=tonumber(ARGV[i + 1]),
      order=redis.call('INCR', SEQ), fence=0})
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
      elseif #found > 0 and m.bytes > room then
        full = true
        break
      else
        room = room - m.bytes
        m.fence = redis.call('INCR', SEQ)
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
  local m = meta(ARGV[i])
  if m and m.fence ~= 0 and m.fence == tonumber(ARGV[i + 1]) then
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
  local m = meta(ARGV[i])
  if m and m.fence ~= 0 and m.fence == tonumber(ARGV[i + 1]) then
    finish(ARGV[i], m, ARGV[1], ARGV[2])
  else
    refused[#refused + 1] = ARGV[i]
  end
end
return refused
"""
)

# ARGV: lease ms, then ids. Returns the unknown ids
RENEW_PUBLISHED = (
    _COMMON
    + """
sweep()
local unknown = {}
for i = 2, #ARGV do
  if redis.call('HEXISTS', M, ARGV[i]) == 1 then
    redis.call('ZADD', LEASE, now + ARGV[1], ARGV[i])
  else
    unknown[#unknown + 1] = ARGV[i]
  end
end
return unknown
"""
)

# ARGV: ids
WITHDRAW = (
    _COMMON
    + """
for _, id in ipairs(ARGV) do
  local m = meta(id)
  if m then forget(id, m) end
end
return 1
"""
)

# KEYS[7]: the producer's ended list; ARGV: ids. Returns those that are nowhere
MISSING = (
    _COMMON
    + """
local ended = {}
for _, text in ipairs(redis.call('LRANGE', KEYS[7], 0, -1)) do
  ended[string.match(text, '^[^\\t]*')] = true
end
local gone = {}
for _, id in ipairs(ARGV) do
  if redis.call('HEXISTS', M, id) == 0 and not ended[id] then gone[#gone + 1] = id end
end
return gone
"""
)

SWEEP = _COMMON + "return sweep()"
