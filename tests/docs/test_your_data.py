"""The example rows of the page on data formats are read as the page says."""

import json

import pytest

from lilpipe.alignment.questions.formats import KINDS, parse, recognise
from lilpipe.alignment.questions.prompts import run
from lilpipe.config.prompts import PromptColumns, PromptsConfig, PromptSource
from lilpipe.schemas.examples import read_conversations
from lilpipe.schemas.pairs import read_examples, read_pairs
from lilpipe.stage import Workspace
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "guides" / "your-data.md"
EXAMPLES = {
    block.title: [json.loads(line) for line in block.text.splitlines()]
    for block in blocks(PAGE)
    if block.language == "json"
}


def test_every_format_has_a_section_with_rows():
    assert EXAMPLES.keys() == {form.name for form in KINDS["auto"]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_shown_row_is_recognised(name):
    for row in EXAMPLES[name]:
        assert recognise("auto", row, PromptColumns()).name == name
        parse("auto", row, PromptColumns())


def test_a_file_of_all_shown_rows_is_read_whole(tmp_path):
    rows = [row for rows in EXAMPLES.values() for row in rows]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptSource(path=str(path), test_ratio=0, validation_ratio=0)
    workspace = Workspace(tmp_path / "work")
    metrics = run(PromptsConfig(families=(), sources=(source,)), {}, workspace)
    assert metrics["quarantined"] == 0
    for name, shown in EXAMPLES.items():
        assert metrics[f"format/{name}"] == len(shown)
    assert len(read_pairs(workspace.output, "train")) == len(EXAMPLES["preferences"])
    assert len(read_examples(workspace.output, "train")) == len(EXAMPLES["unpaired"])
    tools = [item.tools for item in read_conversations(workspace.output) if item.tools]
    assert [each[0]["function"]["name"] for each in tools] == ["time", "time"]
    assert "source 'mine': recognised rows: 6 preferences" in workspace.events.read_text()
