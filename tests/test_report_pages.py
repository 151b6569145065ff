"""Markup planted into every text that a report shows is shown as text. The corpus report has tests of its own."""

import ast
from dataclasses import replace
from pathlib import Path

import lilpipe
from lilpipe import page
from lilpipe.alignment.preference import preferences
from lilpipe.alignment.questions.prompts_report import build_report as prompts_report
from lilpipe.alignment.rollout import rejection_sampling
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.evaluation.estimates import Evaluation, score
from lilpipe.evaluation.evaluation_report import write_page
from lilpipe.schemas.examples import Conversation, Prompt
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokenizer.sample import Text, TokenizerShare
from lilpipe.tokenizer.tokenizer_report import build_report as tokenizer_report
from lilpipe.tokenizer.usage import find_suspects, measure_usage
from lilpipe.training.training_report import write_report

EVIL = "<script>alert(1)</script>"


def assert_shown_as_text(html, times):
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= times


def test_prompts():
    row = dict.fromkeys(("family", "question", "answer", "verifier"), EVIL) | {"difficulty": 2, "split": "train"}
    conversation = Conversation(EVIL, "p", "o", [{"role": "user", "content": EVIL}])
    assert_shown_as_text(prompts_report([row], [conversation], [{EVIL: EVIL, "error": EVIL}]), 9)


def test_rejection_sampling_and_preferences():
    row = {"prompt_id": "p", "family": EVIL, "question": EVIL, "difficulty": 2, "num_words": 2, "ended": True}
    row |= {"completion": EVIL, "correct": True, "reward": 1.0}
    metrics = {**rejection_sampling.summarise([[row, row]], num_kept=1), "reward": 0.25}
    assert_shown_as_text(rejection_sampling._report([[row, row]], [row], metrics), 4)
    metrics = {"pairs": 1.0, "prompts_with_pair_ratio": 0.5, "chosen_words": 2.0, "rejected_words": 3.0}
    assert_shown_as_text(preferences._report([(row, row)], metrics), 3)


def test_training(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.progress(1, 2, "steps", **{EVIL: 1.0})
    config = SFTConfig(seed=0)
    object.__setattr__(config, "identity", lambda: {EVIL: EVIL})
    sections = {EVIL: page.highlighted([(EVIL, True), (EVIL, False)])}
    write_report(workspace, title=EVIL, losses=[2.0, 1.0], config=config, key_figures={EVIL: 1.0}, sections=sections)
    assert_shown_as_text((workspace.report / "report.html").read_text(), 9)


def test_tokenizer():
    tokenizer = train_tokenizer([f"{EVIL} <script> " * 50], vocab_size=278)
    usage = measure_usage(tokenizer, [Text("", EVIL, EVIL, EVIL), Text("", f"{EVIL}2", None, "a b")])
    shares = {EVIL: TokenizerShare(0.5, 10, 20)}
    suspects = find_suspects(usage, 256)
    html = tokenizer_report(tokenizer, usage, suspects, shares, {EVIL: 5}, others=[EVIL], num_base=256)
    assert_shown_as_text(html, 8)


def test_evaluation():
    prompts = [replace(Prompt(EVIL, EVIL, EVIL, EVIL), id=f"{EVIL}{number}") for number in range(2)]
    rows = [
        {"prompt_id": prompt.id, "family": f"{EVIL}{number}", "difficulty": number, "greedy": greedy, "sample": 0}
        | {"completion": EVIL, "correct": True, "well_formed": True, "num_words": 1, "verifiable": True}
        | {"rewards": {EVIL: 1.0}}
        for number, prompt in enumerate(prompts)
        for greedy in (True, False)
    ]
    found = Evaluation(EvaluateConfig(), prompts, {EVIL: rows}, {EVIL: score(rows)}, {EVIL: 1.0}, {}, None)
    assert_shown_as_text(write_page(found), 18)


def test_only_the_templates_and_the_charts_make_markup():
    """So that no other module can let a text through; the type checker refuses plain strings as fragments."""
    package = Path(lilpipe.__file__).parent
    for path in package.rglob("*.py"):
        if path.name not in ("page.py", "charts.py"):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in calls}
            assert names.isdisjoint({"Fragment", "Markup"}), path
    for path in (package / "templates").iterdir():
        assert "safe" not in path.read_text(), path
