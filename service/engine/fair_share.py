"""Which stage gets the device next: the one that has had the least of it, by weight."""

from collections.abc import Mapping, Sequence


class DeviceShares:
    """Fair queueing over the stages of the engine, a piece of work at a time.

    While several have work, each gets device time in proportion to its weight. One that comes back after a
    pause stands level with those at work: time it did not ask for is not owed to it, nor held against it.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._served_s = dict.fromkeys(weights, 0.0)  # over the weight
        self._level_s = 0.0  # where the last one stood that was served
        self._contending: frozenset[str] = frozenset()

    def next(self, ready: Sequence[str]) -> str:
        """Gives the one of `ready`, all that have work, whose turn it is."""
        for name in ready:
            if name not in self._contending:
                self._served_s[name] = max(self._served_s[name], self._level_s)
        self._contending = frozenset(ready)
        chosen = min(ready, key=self._served_s.__getitem__)
        self._level_s = self._served_s[chosen]
        return chosen

    def charge(self, name: str, seconds: float) -> None:
        """Counts what a piece of work took."""
        self._served_s[name] += seconds / self._weights[name]
