"""Counters and gauges of the service, read from /metrics."""

from collections import Counter
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROUTES = ("/caption", "/vqa", "/retrieve")


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading of the metrics.

    statuses: responses of the three routes by HTTP status. shed: the value of blip2_shed_total.
    waiting, running: gauges of the same names.
    """

    statuses: Counter[int]
    shed: int
    waiting: int
    running: int


def scrape(url: str) -> Scrape:
    """Read the metrics of a service."""
    text = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).raise_for_status().text
    statuses: Counter[int] = Counter()
    totals: Counter[str] = Counter()
    for metric in text_string_to_metric_families(text):
        for sample in metric.samples:
            totals[sample.name] += int(sample.value) if sample.value.is_integer() else 0
            if sample.name == "blip2_requests_total" and sample.labels["route"] in ROUTES:
                statuses[int(sample.labels["status"])] += int(sample.value)
    return Scrape(statuses, totals["blip2_shed_total"], totals["blip2_waiting"], totals["blip2_running"])
