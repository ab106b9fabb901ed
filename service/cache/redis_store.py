"""Bytes in Redis, every wait bounded: the client's own defaults stall for seconds in an outage."""

from collections.abc import Mapping, Sequence
from typing import Final, Protocol, cast
from urllib.parse import parse_qs, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

_CONNECT_TIMEOUT_S = 0.1
_SOCKET_TIMEOUT_S = 0.3
_POOL_WAIT_S = 0.1
_MAX_CONNECTIONS = 16
_HEALTH_CHECK_S = 15
_SCHEMES: Final = ("redis", "rediss", "unix")
_OPTIONS: Final = ("db", "protocol", "client_name", "username", "password")  # and ssl_…


class StoreError(Exception):
    """The store did not answer, or not as it should; the message continues its name."""


class RefusedError(StoreError):
    """The store answers and refuses the command: it is full, or read-only."""


class ByteStore(Protocol):
    """Keeps bytes by key for a while. All but `aclose` raise StoreError, `set_many` RefusedError too."""

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]: ...

    async def set_many(self, items: Mapping[str, bytes], ttl_s: int) -> None: ...

    async def delete_many(self, keys: Sequence[str]) -> None: ...

    async def aclose(self) -> None: ...


class RedisStore:
    """A `ByteStore` in Redis, or in a service that speaks its protocol."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        try:
            return cast(Sequence[bytes | None], await self._client.mget(keys))
        except (RedisError, OSError) as exc:
            raise _store_error(exc) from exc

    async def set_many(self, items: Mapping[str, bytes], ttl_s: int) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                for key, value in items.items():
                    pipeline.set(key, value, ex=ttl_s)
                await pipeline.execute()
        except ResponseError as exc:
            raise RefusedError(str(exc)) from exc
        except (RedisError, OSError) as exc:
            raise _store_error(exc) from exc

    async def delete_many(self, keys: Sequence[str]) -> None:
        try:
            await self._client.delete(*keys)
        except ResponseError as exc:
            raise RefusedError(str(exc)) from exc
        except (RedisError, OSError) as exc:
            raise _store_error(exc) from exc

    async def aclose(self) -> None:
        await self._client.aclose()


def check_redis_url(url: str) -> None:
    """Raise ValueError where `open_redis` could not use a URL; the message repeats no part of it."""
    if not url.startswith(tuple(f"{scheme}://" for scheme in _SCHEMES)):
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ValueError(f"has no scheme that is known; start it with {known}")
    if any(char.isspace() for char in url):
        raise ValueError("holds white space; remove it, or percent-encode it")
    try:
        parts, options = urlsplit(url), parse_qs(urlsplit(url).query, strict_parsing="?" in url)
        has_place = bool(parts.path if parts.scheme == "unix" else parts.hostname and parts.port != 0)
    except ValueError:  # without its message, which quotes a part of the password
        has_place = False
    if not has_place or parts.fragment:
        raise ValueError(
            "has no host or port that can be read; percent-encode the special characters of its password "
            "(/ as %2F, # as %23, ? as %3F, [ as %5B, @ as %40, % as %25)"
        )
    if parts.scheme != "unix" and not (parts.path in ("", "/") or parts.path[1:].isdecimal()):
        raise ValueError("has a path that is no database number; end it with /0, or with the port")
    for name in options:
        if name not in _OPTIONS and not name.startswith("ssl_"):
            raise ValueError(f"has an option that is not known; known are {', '.join(_OPTIONS)} and ssl_…")
    try:
        _build_pool(url).make_connection()  # type: ignore[no-untyped-call]  # connects at its first use
    except (RedisError, ValueError, TypeError):
        raise ValueError("has an option whose value cannot be used; correct or drop its options") from None


def open_redis(url: str) -> RedisStore:
    """Build a store that connects when it is first used."""
    return RedisStore(Redis.from_pool(_build_pool(url)))


def _build_pool(url: str) -> BlockingConnectionPool:
    return BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=_POOL_WAIT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=_SOCKET_TIMEOUT_S,
        health_check_interval=_HEALTH_CHECK_S,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
    )


def _store_error(error: Exception) -> StoreError:
    if isinstance(error, AuthenticationError):
        return StoreError("refuses the user or the password of BLIP2_REDIS_URL")
    return StoreError(f"does not answer ({error!r})")
