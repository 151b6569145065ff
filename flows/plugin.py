"""Prefect plugin for bare deployment names, so that `prefect deployment run full-pipeline` works.

Prefect's client expects FLOW/DEPLOYMENT and splits at the slash. This plugin wraps the lookup by name: a name without a
slash means the only deployment of that flow, or its deployment `local`. Prefect loads it where plugins are enabled,
such as in this project's directory by `[tool.prefect.plugins]` in `pyproject.toml`.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from prefect.plugins import register_hook

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.plugins import HookContext

COMPLETED_COMMANDS = (["deployment", "run"], ["deployment", "inspect"])
DEFAULT_DEPLOYMENT = "local"


@register_hook
def setup_environment(*, ctx: HookContext) -> None:  # noqa: ARG001 (the hook's signature)
    """Wrap the client's lookup for the commands that take a deployment name."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if words[:2] in COMPLETED_COMMANDS:
        complete_bare_names()


def complete_bare_names() -> None:
    """Make ``PrefectClient.read_deployment_by_name`` accept a name without a slash. Idempotent."""
    from prefect.client.orchestration import PrefectClient

    original = PrefectClient.read_deployment_by_name
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    async def read_deployment_by_name(self: PrefectClient, name: str) -> Any:
        return await original(self, name if "/" in name else await full_name(self, name))

    PrefectClient.read_deployment_by_name = read_deployment_by_name


async def full_name(client: PrefectClient, flow_name: str) -> str:
    """Return FLOW/DEPLOYMENT for a flow name: its only deployment, or the one named `local`."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    wanted = FlowFilter(name=FlowFilterName(any_=[flow_name]))
    names = [deployment.name for deployment in await client.read_deployments(flow_filter=wanted)]
    chosen = names[0] if len(names) == 1 else DEFAULT_DEPLOYMENT
    return f"{flow_name}/{chosen}"
