"""Alerts and dashboard: their metrics are exported, and the alerts fire on the faults they name."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.runtime.metrics import Metrics
from tests.deploy.documents import KUBERNETES, MONITORING, ROOT, Document

RULES = MONITORING / "rules.yml"
COMPONENT = KUBERNETES / "components" / "monitoring"
DASHBOARD = COMPONENT / "dashboard.json"
RUNBOOK = ROOT / "docs" / "operations.md"


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; enable with: apt-get install prometheus")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def exported() -> set[str]:
    """Return the names of all samples that a new service exports."""
    families = text_string_to_metric_families(Metrics().exposition().decode())
    names = {sample.name for metric in families for sample in metric.samples}
    return names | {"blip2_model_info"}  # which waits for the model


def rule_groups() -> list[Document]:
    groups: list[Document] = yaml.safe_load(RULES.read_text())["groups"]
    return groups


def alerts() -> list[Document]:
    return [rule for group in rule_groups() for rule in group["rules"] if "alert" in rule]


def expressions() -> Iterator[str]:
    for group in rule_groups():
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    scaled = yaml.safe_load((KUBERNETES / "components/autoscale/scaled-object.yaml").read_text())
    yield from (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])
    adapter = yaml.safe_load((KUBERNETES / "components/autoscale-hpa/adapter-values.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        yield from (rule["seriesQuery"], rule["metricsQuery"])


def test_every_series_that_is_asked_for_is_exported() -> None:
    recorded = {rule["record"] for group in rule_groups() for rule in group["rules"] if "record" in rule}
    named = {name for each in expressions() for name in re.findall(r"\b(?:blip2|process)[:_][\w:]+", each)}
    assert named
    assert named - recorded - exported() == set()


def test_every_metric_of_the_service_is_on_the_dashboard() -> None:
    families = text_string_to_metric_families(Metrics().exposition().decode())
    names = {metric.name for metric in families if not metric.name.endswith("_created")}
    text = DASHBOARD.read_text()
    assert {name for name in names if name.startswith("blip2_") and name not in text} == set()


def test_the_bound_of_a_slow_answer_is_a_bound_of_a_bucket() -> None:
    bounds = {bound for each in expressions() for bound in re.findall(r'le="([^"]+)"', each)}
    exposition = Metrics().exposition().decode()
    assert bounds
    assert all(f'le="{bound}"' in exposition for bound in bounds)


def test_the_operator_is_given_the_rules_that_prometheus_loads() -> None:
    resource = yaml.safe_load((COMPONENT / "rules.yaml").read_text())
    assert resource["spec"]["groups"] == rule_groups()


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    headings = re.findall(r"^### (.+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for alert in alerts():
        file, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert ROOT / file == RUNBOOK
        assert anchor in anchors
        assert alert["alert"].lower() in anchor
        assert alert["labels"]["severity"] in ("page", "ticket")


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((ROOT / "tests/deploy/alerts.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test.get("alert_rule_test", ())
        if case.get("exp_alerts")
    }
    assert fired == {alert["alert"] for alert in alerts()}


def test_panels_have_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert all(x < 24 for x, _ in taken)


def test_grafana_is_given_its_dashboard_and_where_prometheus_is() -> None:
    provisioning = MONITORING / "grafana"
    assert "http://prometheus:9090" in (provisioning / "datasources.yml").read_text()
    compose = (ROOT / "docker-compose.yml").read_text()
    [folder] = [
        line.split()[-1]
        for line in (provisioning / "dashboards.yml").read_text().splitlines()
        if "path:" in line
    ]
    assert f"k8s/components/monitoring/dashboard.json:{folder}/" in compose


@pytest.mark.promtool
def test_prometheus_accepts_configuration_and_rules(promtool: str, tmp_path: Path) -> None:
    assert "SUCCESS" in run(promtool, "check", "rules", RULES)
    config = (MONITORING / "prometheus.yml").read_text().replace("/etc/prometheus/rules.yml", str(RULES))
    (tmp_path / "prometheus.yml").write_text(config)
    run(promtool, "check", "config", tmp_path / "prometheus.yml")


@pytest.mark.promtool
def test_alerts_fire_on_the_faults_that_they_claim(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", Path(__file__).parent / "alerts.yml")


@pytest.mark.promtool
def test_every_query_of_dashboard_and_autoscaler_can_be_read(promtool: str, tmp_path: Path) -> None:
    filled = [
        each.replace("$__rate_interval", "1m")
        .replace("<<.LabelMatchers>>", 'pod="a"')
        .replace("<<.GroupBy>>", "pod")
        for each in expressions()
    ]
    rule_list = [{"record": f"query:number{number}", "expr": expr} for number, expr in enumerate(filled)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rule_list}]}))
    assert "SUCCESS" in run(promtool, "check", "rules", path)
