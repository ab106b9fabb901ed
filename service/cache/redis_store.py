"""Bytes in Redis, every wait bounded: the client's own defaults stall for seconds in an outage."""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

_CONNECT_TIMEOUT_S = 0.1
_SOCKET_TIMEOUT_S = 0.3
_POOL_WAIT_S = 0.1
_MAX_CONNECTIONS = 16
_HEALTH_CHECK_S = 15


class StoreError(Exception):
    """The store did not answer, or not as it should."""


class RefusedError(StoreError):
    """The store answers and refuses the command: it is full, or read-only."""


class ByteStore(Protocol):
    """Keeps bytes by key for a while. All but `aclose` raise StoreError, `set_many` RefusedError too."""

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]: ...

    async def set_many(self, items: Mapping[str, bytes], ttl_s: int) -> None: ...

    async def aclose(self) -> None: ...


class RedisStore:
    """A `ByteStore` in Redis, or in a service that speaks its protocol."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        try:
            return cast(Sequence[bytes | None], await self._client.mget(keys))
        except (RedisError, OSError) as exc:
            raise StoreError(repr(exc)) from exc

    async def set_many(self, items: Mapping[str, bytes], ttl_s: int) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                for key, value in items.items():
                    pipeline.set(key, value, ex=ttl_s)
                await pipeline.execute()
        except ResponseError as exc:
            raise RefusedError(str(exc)) from exc
        except (RedisError, OSError) as exc:
            raise StoreError(repr(exc)) from exc

    async def aclose(self) -> None:
        await self._client.aclose()


def open_redis(url: str) -> RedisStore:
    """Build a store that connects when it is first used."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=_POOL_WAIT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=_SOCKET_TIMEOUT_S,
        health_check_interval=_HEALTH_CHECK_S,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
    )
    return RedisStore(Redis.from_pool(pool))
