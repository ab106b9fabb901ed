"""What the service counted itself, read from /metrics, beside what its client saw."""

from collections import Counter
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.load import LoadError, Outcome, Run

ROUTES = ("/caption", "/vqa", "/retrieve")


@dataclass(frozen=True, slots=True)
class Scrape:
    """statuses: answers of the three routes by status. shed: by blip2_shed_total. The rest: gauges."""

    statuses: Counter[int]
    shed: int
    waiting: int
    running: int


def scrape(url: str) -> Scrape:
    """Reads the metrics of a service."""
    text = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).raise_for_status().text
    statuses: Counter[int] = Counter()
    totals: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] += int(sample.value) if sample.value.is_integer() else 0
            if sample.name == "blip2_requests_total" and sample.labels["route"] in ROUTES:
                statuses[int(sample.labels["status"])] += int(sample.value)
    return Scrape(statuses, totals["blip2_shed_total"], totals["blip2_waiting"], totals["blip2_running"])


def check_run(before: Scrape, after: Scrape, run: Run) -> None:
    """Raises LoadError unless the service, idle by now, counted what the client saw between two scrapes."""
    statuses = after.statuses - before.statuses
    seen = {outcome: run.count(outcome) for outcome in Outcome}
    counted = {
        Outcome.ANSWERED: statuses[200],
        Outcome.SHED: statuses[429] + statuses[503],
        Outcome.EXPIRED: statuses[504],
        Outcome.ABANDONED: statuses[499],
    }
    # One that the client gave up on may have been answered in the same moment.
    late = counted[Outcome.ANSWERED] - seen[Outcome.ANSWERED]
    matches = (
        0 <= late <= seen[Outcome.ABANDONED]
        and counted[Outcome.ABANDONED] + late == seen[Outcome.ABANDONED]
        and counted[Outcome.SHED] == seen[Outcome.SHED] == after.shed - before.shed
        and counted[Outcome.EXPIRED] == seen[Outcome.EXPIRED]
    )
    if not matches:
        raise LoadError(f"the service counted {counted}, {after.shed - before.shed} shed; its client {seen}")
