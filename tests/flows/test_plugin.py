import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows import plugin


class Client:
    """Stands in for Prefect's client: flows and the names of their deployments."""

    def __init__(self, **deployments):
        self.deployments = deployments

    async def read_deployments(self, *, flow_filter):
        (flow,) = flow_filter.name.any_
        return [SimpleNamespace(name=name) for name in self.deployments.get(flow, [])]


@pytest.mark.parametrize(
    ("deployments", "name"),
    [(["nightly"], "pipeline/nightly"), (["nightly", "local"], "pipeline/local"), ([], "pipeline/local")],
)
def test_a_bare_name_is_the_only_deployment_or_the_local_one(deployments, name):
    assert asyncio.run(plugin.full_name(cast(Any, Client(pipeline=deployments)), "pipeline")) == name


@pytest.mark.parametrize(
    ("words", "wraps"),
    [(["deployment", "run", "full-pipeline"], True), (["deployment", "inspect", "x"], True), (["deploy"], False)],
)
def test_only_commands_that_take_a_deployments_name_are_completed(monkeypatch, words, wraps):
    calls = []
    monkeypatch.setattr("sys.argv", ["prefect", *words])
    monkeypatch.setattr(plugin, "complete_bare_names", lambda: calls.append(1))
    plugin.setup_environment(ctx=cast(Any, None))
    assert bool(calls) == wraps


def test_completing_twice_wraps_once(monkeypatch):
    from prefect.client.orchestration import PrefectClient

    monkeypatch.setattr(PrefectClient, "read_deployment_by_name", PrefectClient.read_deployment_by_name)
    plugin.complete_bare_names()
    once = PrefectClient.read_deployment_by_name
    plugin.complete_bare_names()
    assert PrefectClient.read_deployment_by_name is once
