import io
import time

from rich.console import Console

from lilpipe.display import Display, quality_table
from lilpipe.pipeline.run import run_step
from tests.conftest import toy_config


def shown(table_or_call, width=160):
    console = Console(file=io.StringIO(), width=width)
    console.print(table_or_call)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_gets_plain_lines_and_a_closing_table(store, faults):
    console = Console(file=io.StringIO(), width=120)
    display = Display(console)
    config = toy_config()
    for _ in range(2):
        for step in config.steps:
            run_step(config, step, store=store, pipeline_run="run", listeners=[display])
    display.summary(config)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "first runs (never run)" in text
    assert "first: 2/2 steps  loss 1" in text
    assert "first cached" in text
    assert "\x1b" not in text
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in cells] == ["first", "second"]
    assert [row[1] for row in cells] == ["cached", "cached"]
    assert cells[0][3] == "loss 1"


def test_time_left_is_told_from_the_pace_so_far(monkeypatch):
    console = Console(file=io.StringIO(), width=120)
    display = Display(console)
    monkeypatch.setattr("lilpipe.display.LINE_SECONDS", 0)
    now = time.time()
    for seconds, done in ((0, 10), (2, 20)):
        event = {"time": now + seconds, "done": done, "total": 50, "unit": "steps", "metrics": {"loss": 3.0}}
        display.stage_event("sft", event)
    assert console.file.getvalue().splitlines()[-1].endswith("20/50 steps  loss 3  6 s left")  # type: ignore[attr-defined]


def test_the_quality_table_shows_each_model_with_its_errors():
    metrics = {
        "accuracy/pretrain": 0.5,
        "accuracy_stderr/pretrain": 0.02,
        "pass_at_2/pretrain": 0.625,
        "pass_at_16/pretrain": 0.75,
        "pass_at_8/pretrain": 0.7,
        "accuracy/sft": 0.625,
        "accuracy_stderr/sft": 0.01,
        "win_rate/sft": 0.5,
    }
    text = shown(quality_table(metrics))
    assert "0.500 ± 0.020" in text
    assert "0.750" in text
    assert "pass at 16" in text
    assert text.index("pretrain") < text.index("sft")
