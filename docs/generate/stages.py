"""The page of stages: what each reads and makes."""

from __future__ import annotations

import inspect
import sys

from lilpipe.stage import STAGES, get_stage


def pages() -> dict[str, str]:
    """Path to Markdown."""
    lines = [
        "# Stages",
        "",
        "A stage reads artifacts through named *inputs* and makes one artifact. `[steps]` says which step's artifact "
        "fills an input. Inputs in italics are optional.",
        "",
        "| Stage | Inputs | Makes | What it does |",
        "| --- | --- | --- | --- |",
    ]
    for name in STAGES:
        stage = get_stage(name)
        inputs = [f"`{role}` ({kind})" for role, kind in stage.inputs.items()]
        inputs += [f"*`{role}` ({kind})*" for role, kind in stage.optional_inputs.items()]
        purpose = (inspect.getdoc(sys.modules[STAGES[name]]) or "").split("\n\n")[0].replace("\n", " ")
        purpose = purpose.removeprefix(f"Stage `{name}`: ")
        settings = f"[`{name}`](settings/{name}.md)"
        lines.append(f"| {settings} | {'<br>'.join(inputs) or 'none'} | {stage.output} | {purpose} |")
    return {"reference/stages.md": "\n".join(lines) + "\n"}
