"""What we have otherwise in Kombu's channels on Redis.

- A channel that closes after Redis went away would write its messages back through the connection
  that is gone, and end the worker with an AttributeError. So it writes none back; their leases end.
- A channel makes a client (a dozen dictionaries) for every command that it sends: a message taken,
  an acknowledgement, an event. Clients hold nothing but their pool, so one serves them all.
"""

from __future__ import annotations

from typing import Any


def adapt_redis_channels() -> None:
    """For all channels of this process; does no harm twice."""
    from kombu.transport.redis import Channel

    _adapt(Channel)


def _adapt(channels: Any) -> None:
    channels.do_restore = False
    if channels._create_client is not _one_client:
        channels._new_client = channels._create_client
        channels._create_client = _one_client


def _one_client(channel: Any, asynchronous: bool = False) -> Any:
    """The channel's client, made anew only where its pool is another one."""
    if asynchronous:  # made once a channel, and bound to the loop's connection
        return channel._new_client(asynchronous)
    client = channel.__dict__.get("_client_of_pool")
    if client is None or client.connection_pool is not channel.pool:
        client = channel._client_of_pool = channel._new_client()
    return client
