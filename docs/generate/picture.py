"""The picture of the architecture page, as SVG; the names of steps come from the default recipe."""

from __future__ import annotations

from html import escape

from lilpipe.config.pipeline import DEFAULT_STEPS

WIDTH, HEIGHT = 1000, 672
GROUPS = {
    "Data": ("prompts", "corpus", "tokenizer", "tokens"),
    "Pretraining": ("pretrain",),
    "Post-training": (),  # the steps that no other group names
    "Release": ("evaluate", "register"),
}
PILL_WIDTH, PILL_HEIGHT, GAP = 128, 36, 10
PANEL_TOP, PANEL_HEIGHT = 262, 176

STYLE = """
text { font-family: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2d33; }
.paper { fill: #ffffff; }
.panel { fill: #f2f6f7; stroke: #b4c4ca; }
.box { fill: #ffffff; stroke: #546e7a; stroke-width: 1.5; }
.plan { fill: #e0f2f1; stroke: #00796b; stroke-width: 1.5; }
.pill { fill: #ffffff; stroke: #546e7a; }
.arrow { stroke: #546e7a; stroke-width: 1.6; fill: none; marker-end: url(#head); }
.head { fill: #546e7a; }
.title { font-weight: 700; font-size: 19px; }
.note { font-size: 16px; fill: #37474f; }
.step { font-size: 15.5px; font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
"""


def pages() -> dict[str, str]:
    """Path to the SVG."""
    return {"explanation/architecture.svg": draw()}


def draw() -> str:
    """From top to bottom: what starts a run, the plan, the steps, and what they work with."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img">',
        "<title>lilpipe: a plan decides which steps run; steps read and write artifacts in a store</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path class="head" d="M0 0 10 5 0 10z"/></marker></defs>',
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
    ]
    starts = {
        "lilpipe run": "in this process",
        "Prefect": "deployments, retries, web UI",
        "Settings": "recipe, then TOML file, then --set",
    }
    for number, (title, note) in enumerate(starts.items()):
        left = 24 + number * 324
        parts += _box(left, 22, 304, 62, title, [note])
        parts.append(_arrow(left + 152, 84, left + 152, 124))
    parts += _box(
        24,
        126,
        952,
        90,
        "Plan",
        [
            "fingerprint of a step = SHA-256 of stage, settings, content of inputs, code, package versions",
            "found in the store: cached.   Not found: the step runs, or resumes where it was killed.",
        ],
        kind="plan",
    )
    parts.append(_arrow(500, 216, 500, PANEL_TOP - 2))
    parts += _steps()
    bottom = PANEL_TOP + PANEL_HEIGHT
    columns = [
        (
            24,
            304,
            "Store",
            [
                "artifacts/ with manifest.json",
                "work/ in progress, checkpoints",
                "a directory, or any fsspec URL",
            ],
        ),
        (
            348,
            304,
            "Workers",
            ["training: torchrun, srun, Kubernetes", "data: datatrove on local, Slurm, Ray", "one process per device"],
        ),
        (
            672,
            304,
            "MLflow",
            ["runs, curves, datasets, registry", "a view: fed from events.jsonl", "and from manifests"],
        ),
    ]
    for left, width, title, notes in columns:
        parts += _box(left, 524, width, 124, title, notes)
    parts += [
        _arrow(130, bottom + 2, 130, 522, both=True),
        _label(142, 487, "artifacts"),
        _arrow(454, bottom + 2, 454, 522, both=True),
        _label(466, 487, "job file, heartbeats"),
        _arrow(778, bottom + 2, 778, 522),
        _label(790, 487, "events.jsonl"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _steps() -> list[str]:
    named = {name for names in GROUPS.values() for name in names}
    groups = {
        title: [name for name in names if name in DEFAULT_STEPS] or [n for n in DEFAULT_STEPS if n not in named]
        for title, names in GROUPS.items()
    }
    columns = {title: -(-len(names) // 3) for title, names in groups.items()}
    free = WIDTH - 48 - sum(count * (PILL_WIDTH + GAP) + GAP for count in columns.values())
    between = free / (len(groups) - 1)
    parts, left = [], 24.0
    for number, (title, names) in enumerate(groups.items()):
        width = columns[title] * (PILL_WIDTH + GAP) + GAP
        parts.append(
            f'<rect class="panel" x="{left:g}" y="{PANEL_TOP}" width="{width}" height="{PANEL_HEIGHT}" rx="8"/>'
            f'<text class="title" x="{left + GAP + 2:g}" y="{PANEL_TOP + 24}">{title}</text>'
        )
        rows = -(-len(names) // columns[title])
        for place, name in enumerate(names):
            x = left + GAP + place // rows * (PILL_WIDTH + GAP)
            y = PANEL_TOP + 36 + place % rows * (PILL_HEIGHT + GAP)
            parts.append(
                f'<rect class="pill" x="{x:g}" y="{y}" width="{PILL_WIDTH}" height="{PILL_HEIGHT}" rx="6"/>'
                + _step_name(name, x + PILL_WIDTH / 2, y)
            )
        left += width
        if number < len(groups) - 1:
            middle = PANEL_TOP + PANEL_HEIGHT / 2
            parts.append(_arrow(left + 2, middle, left + between - 2, middle))
        left += between
    return parts


def _step_name(name: str, middle: float, top: float) -> str:
    """The name in its pill; a long one on two lines."""
    if len(name) <= 13:
        return f'<text class="step" x="{middle:g}" y="{top + 24:g}" text-anchor="middle">{name}</text>'
    cut = name.index("_") + 1
    return "".join(
        f'<text class="step" style="font-size: 13px" x="{middle:g}" y="{y:g}" text-anchor="middle">{part}</text>'
        for part, y in ((name[:cut], top + 16), (name[cut:], top + 30))
    )


def _box(left: int, top: int, width: int, height: int, title: str, notes: list[str], kind: str = "box") -> list[str]:
    middle = left + width / 2
    lines = [
        f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="{middle:g}" y="{top + 25}" text-anchor="middle">{escape(title)}</text>',
    ]
    for number, note in enumerate(notes):
        y = top + 50 + 24 * number
        lines.append(f'<text class="note" x="{middle:g}" y="{y}" text-anchor="middle">{escape(note)}</text>')
    return lines


def _arrow(x1: float, y1: float, x2: float, y2: float, *, both: bool = False) -> str:
    start = ' marker-start="url(#head)"' if both else ""
    return f'<path class="arrow"{start} d="M{x1:g} {y1:g} L{x2:g} {y2:g}"/>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text class="note" x="{x:g}" y="{y:g}">{escape(text)}</text>'
