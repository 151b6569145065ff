"""The examples of docs/extend/ are extracted from the pages and used, from a file and from an installed package."""

import sqlite3
import sys
from collections import Counter

import pytest
import torch

from lilpipe.alignment.preference.objective import preference_loss
from lilpipe.alignment.questions import prompts
from lilpipe.alignment.rewards.reward_functions import CompletionText, Rewards
from lilpipe.config.prompts import RewardConfig
from lilpipe.data.sources.readers import RawDocument, Unreadable, digest_source, find_parts, read_part
from lilpipe.errors import DataError
from lilpipe.extensions import GROUPS, ExtensionKind
from lilpipe.fingerprint import code_and_packages
from lilpipe.pipeline.plan import plan
from lilpipe.pipeline.run import run_step
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.recipes import load
from lilpipe.schemas.documents import read_documents, read_rejected
from lilpipe.schemas.examples import Prompt, read_prompts
from lilpipe.stage import Workspace
from tests.data.prose import prose, write_jsonl
from tests.docs.pages import ALL, ROOT

PAGES: dict[str, ExtensionKind] = {
    "stage": "stage",
    "source": "source",
    "filter": "filter",
    "reward": "reward",
    "loss": "loss",
    "recipe": "recipe",
    "question_family": "question family",
}
NAMES = {
    "stage": "common_words",
    "source": "sqlite",
    "filter": "Shouting",
    "reward": "brevity",
    "loss": "hinge",
    "recipe": "sft_only",
    "question_family": "parity",
}
WEB = (
    '\n[[corpus.sources]]\nkind = "jsonl"\nname = "web"\npath = "{path}"\n\n[corpus]\nnum_workers = 1\nlanguages = []\n'
    "language = {{ min_score = 0 }}\n"
)


def example(page, title):
    (block,) = [block for block in ALL if block.page == f"docs/extend/{page}.md" and block.title == title]
    return block.text


def write_example(page, folder):
    """``mine.py`` and ``mine.toml`` of a page; returns the latter."""
    for title in ("mine.py", "mine.toml"):
        (folder / title).write_text(example(page, title), encoding="utf-8")
    return folder / "mine.toml"


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def fingerprinted(config, step):
    """The code that counts for a step, by its settings."""
    return code_and_packages(config.steps[step].stage, config.section(step).extensions())[0]


@pytest.fixture
def documents(tmp_path):
    text = prose(9)
    size = len(text) * 2 // 3  # the rest has the stop words that a filter before it wants
    texts = [*(prose(n) for n in range(4)), text[:size].upper() + text[size:]]
    write_jsonl(tmp_path / "web.jsonl", [{"text": text} for text in texts])
    return tmp_path / "web.jsonl"


# --- the pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_an_example_is_complete_in_under_30_lines_and_its_page_is_linked(page):
    assert len(example(page, "mine.py").splitlines()) < 30
    index = (ROOT / "docs" / "extend" / "index.md").read_text(encoding="utf-8")
    text = (ROOT / "docs" / "extend" / f"{page}.md").read_text(encoding="utf-8")
    group = GROUPS[PAGES[page]]
    assert f"({page}.md)" in index
    assert f"`{group}`" in index
    assert f"the group `{group}`" in text
    assert f"`{NAMES[page]} = " in text


def test_a_stage_and_a_filter_run_in_a_pipeline(tmp_path, store, documents):
    file = write_example("stage", tmp_path)
    (tmp_path / "filters.py").write_text(example("filter", "mine.py"))
    filters = example("filter", "mine.toml").replace("mine.py", "filters.py")
    file.write_text(f"{file.read_text()}\n{filters}\n{WEB.format(path=documents)}")
    config = load("tiny", file=file)
    assert [step.status for step in plan(config, store).values()] == ["run", "waits"]
    (corpus, _), (words, cached) = [run_step(config, step, store=store, pipeline_run="r") for step in config.steps]
    assert not cached
    rejected = [row for batch in read_rejected(corpus.path) for row in batch.to_pylist()]
    assert [(row["stage"], row["reason"]) for row in rejected] == [("shouting", "too_many_capitals")]
    assert 0.5 < rejected[0]["scores"]["shouting.upper_ratio"] < 0.8
    texts: list[str] = [text for batch in read_documents(corpus.path) for text in batch["text"].to_pylist()]
    kept: Counter[str] = Counter(" ".join(texts).split())
    listed = dict(line.split("\t") for line in (words.path / "words.tsv").read_text().splitlines())
    assert listed == {word: str(kept[word]) for word in listed}
    assert len(listed) == 3
    assert words.manifest.metrics == {"distinct_words": len(kept)}
    assert words.manifest.config == {"num_words": 3}
    assert (
        "Shouting" in (corpus.path / "report" / "report.html").read_text()
        or "shouting" in (corpus.path / "report" / "report.html").read_text()
    )

    def statuses():
        return [(step.status, step.reason.split(":")[0]) for step in plan(load("tiny", file=file), store).values()]

    edit(tmp_path / "mine.py", "def run(", "# a comment\ndef run(")
    assert statuses() == [("cached", "up to date")] * 2
    edit(tmp_path / "mine.py", '"words")', '"WORDS")')
    assert statuses() == [("cached", "up to date"), ("run", "code stage 'common_words'")]
    edit(tmp_path / "mine.py", '"WORDS")', '"words")')
    edit(tmp_path / "filters.py", "letter.isalpha()", "letter != 'x'")
    assert statuses() == [("run", "code filter 'Shouting'"), ("waits", "after corpus")]
    edit(tmp_path / "filters.py", "letter != 'x'", "letter.isalpha()")
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("mine.py", "filters.py", "mine.toml"):
        (tmp_path / name).rename(folder / name)
    file = folder / "mine.toml"
    assert statuses() == [("cached", "up to date")] * 2  # the path is no part of the fingerprint


def test_a_source_is_read_and_its_rows_are_digested(tmp_path):
    file = write_example("source", tmp_path)
    with sqlite3.connect(tmp_path / "tickets.db") as database:
        database.execute("CREATE TABLE tickets (id TEXT, body TEXT)")
        database.executemany("INSERT INTO tickets VALUES (?, ?)", [("b", "second"), ("a", "first"), ("c", "")])
    edit(file, '"tickets.db"', f'"{tmp_path}/tickets.db"')
    (source,) = load("tiny", file=file).corpus.sources
    (part,) = find_parts(source)
    *documents, empty = read_part(part)
    assert [(row.id, row.text) for row in documents if isinstance(row, RawDocument)] == [
        ("a", "first"),
        ("b", "second"),
    ]
    assert isinstance(empty, Unreadable)
    assert empty.error == "'text' is empty"
    before = digest_source(source)
    assert digest_source(source) == before
    with sqlite3.connect(tmp_path / "tickets.db") as database:
        database.execute("UPDATE tickets SET body = 'changed' WHERE id = 'b'")
    assert digest_source(source) != before
    broken = source.model_copy(update={"options": {"tables": 1}})
    with pytest.raises(DataError, match="source 'tickets': source 'sqlite' fails: TypeError"):
        digest_source(broken)


def test_a_reward_counts_for_the_stages_that_use_it(tmp_path):
    config = load("tiny", file=write_example("reward", tmp_path))
    rewards = Rewards(config.grpo.rewards)
    answers = [CompletionText(text, True, 9) for text in ("Answer: 5", "Well, as I see it, the Answer: 5", "Answer: 6")]
    scored = rewards([Prompt("p", "addition", "2 + 3?", "5")] * 3, answers)
    assert [each.parts["brevity"] for each in scored] == [1.0, 0.5, 0.0]
    assert scored[0].total == 1.5
    before = {step: fingerprinted(config, step) for step in config.steps}
    edit(tmp_path / "mine.py", "0.0", "-1.0")
    changed = {step for step in config.steps if fingerprinted(config, step) != before[step]}
    assert changed == {"grpo"}


def test_a_loss_has_the_values_and_gradients_of_its_formula(tmp_path):
    config = load("tiny", file=write_example("loss", tmp_path)).dpo
    ratios_S = torch.tensor([1.0, 9.0, 0.5, 1.0], requires_grad=True)  # chosen, chosen, rejected, rejected
    loss_N = preference_loss(ratios_S, torch.ones(2, dtype=torch.bool), config)
    assert loss_N.tolist() == [2 - 0.5 * 0.5, 0.0]
    loss_N.sum().backward()
    assert ratios_S.grad is not None
    assert ratios_S.grad.tolist() == [-0.5, 0.0, 0.5, 0.0]
    assert config.uses_reference
    edit(tmp_path / "mine.py", "torch.relu(margin", "torch.sum(margin")
    with pytest.raises(DataError, match=r"dpo.loss_type 'hinge': got \[\], expected a tensor of shape \[2\]"):
        preference_loss(ratios_S, torch.ones(2, dtype=torch.bool), config)


def test_a_recipe_is_a_configuration_that_can_run(tmp_path):
    config = load("tiny", file=write_example("recipe", tmp_path))
    assert config.recipe == "sft_only"
    assert list(config.steps) == ["prompts", "corpus", "tokenizer", "tokens", "pretrain", "sft", "evaluate"]
    assert config.sft.num_epochs == 3
    for step in config.steps:
        check_wiring(config, step)


SMALL = {"num_documents": 20, "num_demonstrations": 5, "num_train": 8, "num_validation": 6, "num_test": 6}


def test_a_question_family_is_drawn_beside_the_built_in_ones(tmp_path):
    config = load("tiny", file=write_example("question_family", tmp_path), overrides={
        f"prompts.{name}": value for name, value in SMALL.items()
    }).prompts  # fmt: skip
    prompts.run(config, {}, Workspace(tmp_path / "work"))
    asked = [prompt for prompt in read_prompts(tmp_path / "work" / "output", "test") if prompt.family == "parity"]
    assert len(asked) == 3
    for prompt in asked:
        number = int(prompt.question.split()[1])
        assert prompt.answer == ("odd" if number % 2 else "even")
        assert 2 <= len(str(number)) <= 4


# --- as an installed package --------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A distribution on the search path, with a module for each example and all their entry points."""
    folder = tmp_path / "site"
    (folder / "mypackage").mkdir(parents=True)
    (folder / "mypackage" / "__init__.py").write_text("")
    lines = []
    for page, name in NAMES.items():
        text = example(page, "mine.py")
        if page == "reward":
            text = f"from .sizes import FEW\n{text}".replace("target_words=8", "target_words=FEW")
        (folder / "mypackage" / f"{page}.py").write_text(text)
        group = GROUPS[PAGES[page]]
        lines.append(f"[{group}]\n{name} = mypackage.{page}:{name}\n")
    (folder / "mypackage" / "sizes.py").write_text("FEW = 4\n")
    install(folder, "mypackage", "\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mypackage"]:
        del sys.modules[name]


def install(folder, name, entry_points):
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_each_part_of_a_package_is_found_by_its_name(package, tmp_path):
    steps = {"words": {"stage": "common_words", "inputs": {"corpus": "corpus"}}}
    sources = [{"kind": "sqlite", "name": "tickets", "path": "tickets.db"}]
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "sft_only"\n')
    overrides = {
        "corpus.sources": sources,
        "corpus.filters": [{"kind": "Shouting"}],
        "grpo.rewards": [{"kind": "brevity"}],
        "dpo.loss_type": "hinge",
        "prompts.families": ["parity"],
    }
    config = load("tiny", file=file, overrides=overrides)
    assert config.recipe == "sft_only"
    assert {extension.name for extension in config.extensions()} == set(NAMES.values()) - {"common_words", "sft_only"}
    steps = {"corpus": {"stage": "corpus"}, **steps}
    config = load("tiny", overrides={**overrides, "steps": steps, "common_words.num_words": 5})
    assert config.section("words").num_words == 5
    check_wiring(config, "words")
    scores = Rewards(config.grpo.rewards)([Prompt("p", "f", "?", "5")], [CompletionText("Answer: 5", True, 2)])
    assert scores[0].total == 1.0


def test_a_stage_of_a_package_runs_in_a_worker(package, store, documents):
    steps = {"corpus": {"stage": "corpus"}, "words": {"stage": "common_words", "inputs": {"corpus": "corpus"}}}
    source = {"kind": "jsonl", "name": "web", "path": str(documents)}
    config = load("tiny", overrides={"steps": steps, "corpus.sources": [source], "corpus.num_workers": 1})
    artifacts = [run_step(config, step, store=store, pipeline_run="r")[0] for step in config.steps]
    assert len((artifacts[1].path / "words.tsv").read_text().splitlines()) == 10
    assert "mypackage.stage" in artifacts[1].manifest.code
    edit(package / "mypackage" / "stage.py", '"words")', '"WORDS")')
    assert [step.status for step in plan(config, store).values()] == ["cached", "run"]


def test_the_modules_that_a_package_imports_count_and_its_other_modules_do_not(package):
    config = load("tiny", overrides={"grpo.rewards": [{"kind": "brevity"}]})
    before = {step: fingerprinted(config, step) for step in config.steps}
    assert {name for name in before["grpo"] if "mypackage" in name} == {
        "mypackage", "mypackage.reward", "mypackage.sizes",
    }  # fmt: skip
    (package / "mypackage" / "sizes.py").write_text("FEW = 4  # words\n")
    edit(package / "mypackage" / "loss.py", "relu", "tanh")
    assert {step: fingerprinted(config, step) for step in config.steps} == before
    (package / "mypackage" / "sizes.py").write_text("FEW = 5\n")
    assert {step for step in config.steps if fingerprinted(config, step) != before[step]} == {"grpo"}


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry_points", "message"),
    [
        ("[lilpipe.rewards]\nbrevity = other:b\n", r"'brevity': got two entry points in the group lilpipe\.rewards, "),
        ("[lilpipe.rewards]\nanswer = other:b\n", "of second has the name of a built-in reward; rename"),
        ("[lilpipe.rewards]\nbad = broken:b\n", r"bad = broken:b of second fails on import: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_entry_points_is_told(package, tmp_path, monkeypatch, entry_points, message):
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "broken.py").write_text("1 / 0\n")
    install(folder, "second", entry_points)
    monkeypatch.syspath_prepend(str(folder))
    kind = entry_points.split("\n")[1].split(" ")[0]
    with pytest.raises(ValueError, match=message):
        Rewards([RewardConfig(kind=kind)])
