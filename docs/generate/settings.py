"""A page for each section of the configuration, from its pydantic models."""

from __future__ import annotations

import inspect

from lilpipe.config.describe import Setting, Table, all_settings, default_of, describe, rows_of, section_of, tables
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.recipes import RECIPES

__all__ = ["all_settings", "pages", "tables"]

FOLDER = "reference/settings"


def pages() -> dict[str, str]:
    """Path to Markdown: an index, the settings of the pipeline as a whole, and a page for each section."""
    tiny = RECIPES["tiny"]()
    whole, sections = [], {}
    for name, field in PipelineConfig.model_fields.items():
        key = field.alias or name
        if section := section_of(field.annotation):
            sections[key] = list(tables(section, f"[{key}]", default_of(field), getattr(tiny, name)))
        else:
            whole += [describe(key, field, default_of(field), getattr(tiny, name), "")]
            sections.setdefault("pipeline", [])
    steps = inspect.getdoc(PipelineConfig) or ""
    sections["pipeline"] = [
        Table("[pipeline]", f"{steps} These settings stand at the top of the file, before any table.", whole),
        *rows_of(PipelineConfig.model_fields["steps"], "steps", ""),
    ]
    found = {f"{FOLDER}/{key}.md": _page(key, found) for key, found in sections.items()}
    return {f"{FOLDER}/index.md": _index(sections), **found}


# --- Markdown -----------------------------------------------------------------------------------------------------


def _index(sections: dict[str, list[Table]]) -> str:
    count = sum(len(table.settings) for found in sections.values() for table in found)
    lines = [
        "# Settings",
        "",
        f"All {count:,} settings, generated from the models in `lilpipe/config/`. Values come from a recipe, then from "
        "your TOML file, then from `--set` on the command line. Unknown settings are errors.",
        "",
        "Some settings carry a mark:",
        "",
        "- **operational**: cannot change a stage's output. It is not part of the fingerprint: changing it rebuilds "
        "nothing.",
        "- **rounding only**: changes the order of floating-point sums and nothing else. Part of the fingerprint, but "
        "work in progress resumes under another value.",
        "",
        "Shares are numbers from 0 to 1. *Not set* means that the setting is absent: TOML has no null. *In `tiny`* is "
        "the value of the default recipe, where it differs from the default.",
        "",
        "| Section | What it configures |",
        "| --- | --- |",
    ]
    for key, found in sections.items():
        lines.append(f"| [`{key}`]({key}.md) | {found[0].meaning.split(chr(10) * 2)[0].replace(chr(10), ' ')} |")
    return "\n".join(lines) + "\n"


def _page(key: str, found: list[Table]) -> str:
    title = "The whole pipeline" if key == "pipeline" else key
    parts = [f"# {title}", ""]
    for number, table in enumerate(found):
        if number or key != "pipeline":
            parts.append(f"## `{table.header}` {{#{table.anchor}}}\n")
        parts.append(f"{table.meaning}\n")
        parts += [_entry(setting) for setting in table.settings]
    return "\n".join(parts)


def _entry(setting: Setting) -> str:
    facts = [setting.type + (f", {setting.unit}" if setting.unit else "")]
    quoted = setting.default not in ("required", "not set", "empty", "set", "see the source")
    if setting.default == "required":
        facts.append("**required**")
    else:
        facts.append(f"default {f'`{setting.default}`' if quoted else setting.default}")
    if setting.recipe_default is not None:
        facts.append(f"in `tiny` `{setting.recipe_default}`")
    if setting.effect:
        facts.append({"operational": "**operational**", "rounding": "**rounding only**"}[setting.effect])
    meaning = (
        "".join(
            f"\n\n    {line}" if not number else f"\n    {line}"
            for number, line in enumerate(setting.meaning.splitlines())
        )
        if setting.meaning
        else ""
    )
    return f"`{setting.name}`{{#{setting.name}.}}\n:   {' · '.join(facts)}{meaning}\n"
