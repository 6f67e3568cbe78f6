"""Metrics count what happens; the dashboard asks for none that is not there; none has a prompt or a client's words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.client.client import Client
from tests.cluster.serving.serving import ServerThread

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

MONITORING = Path(__file__).resolve().parents[4] / "configs" / "monitoring"


def read(http: httpx.Client) -> dict[tuple[str, tuple], float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for each in families for one in each.samples}


def value(found: dict, name: str, **labels: str) -> float:
    return found.get((f"outrider_{name}", tuple(sorted(labels.items()))), 0.0)


def test_requests_of_both_doors_are_counted(server: ServerThread, client: openai.OpenAI, http: httpx.Client) -> None:
    before = read(http)
    answer = client.completions.create(model="tiny", prompt="abc abc abc abc", max_tokens=16)
    chunks = answer.choices[0].model_extra["outrider"]["run_lengths"]
    with Client(server.address) as grpc_client:
        reply = grpc_client.complete("abcd abcd abcd", sampling={"max_new_tokens": 9, "ignore_eos": True})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="abc", temperature=-1)
    after = read(http)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    num_new = answer.usage.completion_tokens + 9
    assert more("generation_tokens_total") == num_new
    assert more("prompt_tokens_total") == answer.usage.prompt_tokens + 14
    steps = len(chunks) + len(reply.run_lengths)
    assert more("tokens_per_step_count") == steps and more("tokens_per_step_sum") == num_new
    assert more("time_to_first_token_seconds_count") == more("e2e_request_latency_seconds_count") == 2
    assert more("request_queue_time_seconds_count") == 2
    assert more("inter_token_latency_seconds_count") == steps - 2
    assert more("calls_total", door="http", method="POST /v1/completions", status="200") == 1
    assert more("calls_total", door="http", method="POST /v1/completions", status="400") == 1
    assert more("calls_total", door="grpc", method="Generate", status="OK") == 1
    assert more("requests_refused_total", reason="InvalidRequestError") == 1
    accepted = num_new - steps
    assert more("spec_decode_num_accepted_tokens_total") >= accepted > 0
    assert more("spec_decode_num_draft_tokens_total") > more("spec_decode_num_accepted_tokens_total")
    assert sum(more("spec_decode_num_accepted_tokens_per_pos_total", position=str(at)) for at in range(9)) == more(
        "spec_decode_num_accepted_tokens_total"
    )
    by_source = [more("source_accepted_rows_total", source=name) for name in ("jacobi", "suffix", "recycle")]
    assert max(by_source) <= more("spec_decode_num_accepted_tokens_total") <= sum(by_source)
    assert value(after, "up") == 1 and 0 <= value(after, "kv_cache_usage_perc") <= 1


def test_the_dashboard_asks_for_what_there_is(http: httpx.Client, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="abc", max_tokens=4)
    there = {name for name, _ in read(http)}
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"outrider_\w+", target["expr"])
    }
    assert len(asked) > 20 and asked - there == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_metric_is_described_and_named_as_its_kind(http: httpx.Client) -> None:
    for family in text_string_to_metric_families(http.get("/metrics").text):
        assert family.name.startswith("outrider_") and family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram"), family.name


def test_the_prometheus_example_scrapes_the_default_port() -> None:
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["static_configs"][0]["targets"] == ["localhost:8000"]


def test_what_clients_make_up_is_in_no_metric(http: httpx.Client, client: openai.OpenAI) -> None:
    http.get("/xyzzy/path")
    http.request("XYZZY", "/v1/models")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="xyzzy", prompt="xyzzy")
    client.completions.create(model="tiny", prompt="xyzzy", user="xyzzy", extra_body={"request_id": "xyzzy"})
    assert "xyzzy" not in http.get("/metrics").text.lower()
