from lilpipe.alignment.preference import dpo, preferences
from lilpipe.alignment.rl import grpo
from lilpipe.alignment.rollout import rejection_sampling
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.schemas.pairs import PAIR_SCHEMA
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace
from tests.alignment.conftest import as_artifact
from tests.alignment.preference.test_dpo import pair
from tests.alignment.rl.test_grpo import CONFIG as GRPO

ROW = {"prompt_id": "p", "family": "sort", "question": "Sort <3> 1.", "difficulty": 2, "num_words": 2, "ended": True}
RIGHT = {**ROW, "completion": "Answer: 1 3", "correct": True, "reward": 1.0}
WRONG = {**ROW, "completion": "<b>?</b>", "correct": False, "reward": 0.0}


def test_rejection_samplings_report_shows_pass_rates_and_escapes_what_a_model_wrote():
    groups = [[RIGHT, WRONG], [WRONG, WRONG]]
    metrics = {**rejection_sampling.summarise(groups, num_kept=1), "reward": 0.25}
    html = rejection_sampling._report(groups, [RIGHT], metrics)
    assert "Sort &lt;3&gt; 1." in html
    assert "<b>?</b>" not in html
    assert '<td>1 of 2</td><td class="number">1</td><td class="number">50.0%</td>' in html
    assert "pass_at_2" in html


def test_the_preferences_report_shows_pairs():
    metrics = {"pairs": 1.0, "prompts_with_pair_ratio": 0.5, "chosen_words": 2.0, "rejected_words": 3.0}
    html = preferences._report([(RIGHT, WRONG)], metrics)
    assert "50.0%" in html
    assert "Answer: 1 3" in html


def test_training_stages_report_their_curves(tmp_path, make_checkpoint, prompts):
    write_rows(tmp_path / "pairs" / "pairs.arrow", [vars(pair(i)) for i in range(4)], PAIR_SCHEMA)
    pairs = as_artifact(tmp_path / "pairs", kind="Preferences")
    model = make_checkpoint()
    dpo.run(DPOConfig(seed=0, batch_size=4), {"model": model, "preferences": pairs}, Workspace(tmp_path / "dpo"))
    config = GRPOConfig.model_validate({**GRPO.model_dump(), "num_steps": 1})
    grpo.run(config, {"model": model, "prompts": prompts}, Workspace(tmp_path / "grpo"))
    for stage, curve in (("dpo", "preference accuracy"), ("grpo", "frac reward zero std")):
        assert curve in (tmp_path / stage / "output" / "report" / "report.html").read_text()
