import json

import numpy as np
import pytest

from lilpipe.artifact import InputEntry
from lilpipe.config.model import ModelConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.flops import num_parameters, training_flops_per_token
from lilpipe.recipes import load
from lilpipe.scaling import study as study_module
from lilpipe.scaling.scaling_report import draw, write_study
from lilpipe.scaling.study import (
    Run,
    configurations,
    finished_run,
    planned_run,
    stored_runs,
    study,
    tokens_per_parameter,
    trained_runs,
)
from tests.artifacts import make_manifest

METRIC = "validation_bits_per_byte_corpus"


def a_run(parameters, ratio=20, loss=None):
    flops = 6.0 * parameters * parameters * ratio
    return Run(4, round(parameters), round(parameters * ratio), flops, loss)


def trained(parameters, ratio=20):
    run = a_run(parameters, ratio)
    return a_run(parameters, ratio, 1.1 + 100 * run.parameters**-0.4 + 150 * run.tokens**-0.35)


SIZES = [1e5, 2e5, 4e5, 1e6, 3e6]


def manifest(model, *, tokens, loss, vocab_size=300, data="corpus", **metrics):
    measured = {METRIC: loss, "tokens": float(tokens), "num_parameters": float(num_parameters(model, vocab_size))}
    entry = InputEntry(uri="there", stage="tokens", fingerprint="f", content_digest=data)
    return make_manifest(
        kind="Checkpoint",
        stage="pretrain",
        fingerprint=f"{model.num_layers}-{tokens}-{loss}",
        config={"model": model.model_dump(), "seq_len": None},
        inputs={"tokens": [entry]},
        metrics=measured | metrics,
        created_at=f"{loss}",
    )


# --- the law and its predictions ------------------------------------------------------------------------------------


def test_runs_that_are_scaled_alike_give_a_law_of_compute():
    found = study([trained(size) for size in SIZES], metric=METRIC, target=a_run(1e7))
    assert list(found.law.coefficients) == ["FLOPs"]
    assert found.target is not None
    assert found.target.loss == pytest.approx(trained(1e7).loss, rel=0.01)


def test_runs_of_several_lengths_give_a_law_of_parameters_and_tokens():
    runs = [trained(size, ratio) for size in SIZES for ratio in (5, 20, 80)]
    found = study(runs, metric=METRIC, target=a_run(1e7))
    assert found.law.exponents == pytest.approx({"parameters": 0.4, "tokens": 0.35}, rel=0.02)
    assert found.target is not None
    assert found.target.loss == pytest.approx(trained(1e7).loss, rel=0.003)


def test_the_largest_run_is_predicted_from_the_others_alone():
    runs = [trained(size) for size in SIZES]
    spoilt = [*runs[:-1], a_run(SIZES[-1], loss=9.0)]
    whole, changed = study(runs, metric=METRIC).held_out, study(spoilt, metric=METRIC).held_out
    assert whole is not None
    assert changed is not None
    assert changed.loss == whole.loss
    assert (changed.run.loss, whole.run.loss) == (9.0, runs[-1].loss)
    assert whole.loss == pytest.approx(whole.run.loss, rel=0.01)


def test_three_runs_give_a_law_but_nothing_to_hold_it_to():
    found = study([trained(size) for size in SIZES[:3]], metric=METRIC, target=a_run(1e7))
    assert found.held_out is None
    assert found.target is not None
    assert found.target.interval is None


def test_ratios_within_a_tenth_are_one():
    assert tokens_per_parameter([a_run(1e5, 20), a_run(2e5, 21), a_run(1e5, 40)]) == pytest.approx([20, 40])


# --- where runs come from -------------------------------------------------------------------------------------------


def test_what_a_run_took_is_read_from_its_manifest():
    model = ModelConfig(tie_embeddings=False)
    run = finished_run(manifest(model, tokens=5_000, loss=2.5), METRIC)
    assert (run.parameters, run.tokens, run.loss) == (num_parameters(model, 300), 5_000, 2.5)
    assert run.flops == 5_000 * training_flops_per_token(model, 300)


def test_a_planned_run_takes_what_the_same_run_took_when_it_was_done():
    config = load("tiny", overrides={"depth": 2})
    tokens = config.pretrain.num_steps * config.pretrain.batch_size * 128
    done = manifest(config.pretrain.model, tokens=tokens, loss=2.0, vocab_size=config.tokenizer.vocab_size)
    planned, finished = planned_run(config), finished_run(done, METRIC)
    assert (planned.parameters, planned.tokens, planned.flops) == (finished.parameters, finished.tokens, finished.flops)


def test_runs_in_the_store_are_those_on_the_newest_tokens_each_shape_once(store, monkeypatch):
    small, large = ModelConfig(num_layers=2), ModelConfig(num_layers=4)
    manifests = [
        manifest(large, tokens=10, loss=4.0, data="old corpus"),
        manifest(small, tokens=10, loss=3.0),
        manifest(large, tokens=10, loss=2.5),
        manifest(small, tokens=10, loss=2.9),
    ]
    monkeypatch.setattr(store, "manifests", lambda stage: manifests if stage == "pretrain" else [])
    assert sorted((run.num_layers, run.loss) for run in stored_runs(store, metric=METRIC)) == [(2, 2.9), (4, 2.5)]


def test_an_empty_store_is_answered_with_what_to_do(store):
    with pytest.raises(DataError, match="contains no finished pretraining run; train some with --depths"):
        stored_runs(store, metric=METRIC)


def test_a_metric_that_a_run_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(ConfigError, match=f"metric 'loss': there is no such metric; known: {METRIC}"):
        finished_run(manifest(ModelConfig(), tokens=10, loss=2.0), "loss")


def test_each_depth_is_trained_for_each_number_of_tokens_a_parameter():
    def tiny(changes):
        return load("tiny", overrides={"tokenizer.vocab_size": 512, **changes})

    configs = configurations(tiny, depths=[1, 2], ratios=[20, 5])
    ratios = [planned_run(config).ratio for config in configs]
    assert [config.depth for config in configs] == [1, 1, 2, 2]
    assert ratios == pytest.approx([20, 5, 20, 5], rel=0.02)
    assert all(config.tokenizer.vocab_size == 512 for config in configs)


def test_runs_that_could_tell_no_law_are_refused_before_any_is_trained(store, monkeypatch):
    monkeypatch.setattr(study_module, "run_step", lambda *_, **__: pytest.fail("a step ran"))
    alike = [load("tiny", overrides={"depth": depth, "pretrain.model.num_layers": 2}) for depth in (2, 2, 2)]
    with pytest.raises(DataError, match="1 different values of FLOPs, expected 3 or more"):
        trained_runs(alike, metric=METRIC, store=store)
    with pytest.raises(DataError, match="got 1 runs, expected at least 3"):
        trained_runs(alike[:1], metric=METRIC, store=store)


def test_every_step_up_to_pretraining_is_run_and_none_after_it(store, monkeypatch):
    ran = []

    def run_step(config, step, **_):
        from lilpipe.artifact import Artifact

        ran.append((config.depth, step))
        done = manifest(config.pretrain.model, tokens=1_000, loss=3.0 - config.depth / 10)
        return Artifact(uri="", path=store.local, manifest=done), True

    monkeypatch.setattr(study_module, "run_step", run_step)
    monkeypatch.setattr(study_module, "check_wiring", lambda *_: None)  # it imports every stage
    configs = [load("tiny", overrides={"depth": depth}) for depth in (1, 2, 3)]
    runs = trained_runs(configs, metric=METRIC, store=store)
    steps = ["prompts", "corpus", "tokenizer", "tokens", "pretrain"]
    assert ran == [(depth, step) for depth in (1, 2, 3) for step in steps]
    assert [run.loss for run in runs] == [2.9, 2.8, 2.7]


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_shows_runs_law_and_predictions(tmp_path):
    found = study([trained(size) for size in SIZES], metric=METRIC, target=a_run(1e7))
    page = write_study(found, tmp_path / "report").read_text()
    assert "held out, 4 layers" in page
    assert "target, 4 layers" in page
    assert str(found.law).split(" FLOPs")[0] in page
    assert (tmp_path / "report" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "report" / "scaling.json").read_text())
    assert written["law"]["floor"] == found.law.floor
    assert len(written["runs"]) == len(SIZES)


def test_the_plot_draws_each_run_where_it_is():
    runs = [trained(size, ratio) for size in SIZES for ratio in (5, 20)]
    (axes,) = draw(study(runs, metric=METRIC, target=a_run(1e7))).axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    drawn = {(x, y) for line in points for x, y in np.asarray(line.get_xydata()).tolist()}
    assert drawn == {(run.flops, run.loss) for run in runs}
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1
    assert np.asarray(dashed[0].get_xydata())[-1, 0] == pytest.approx(a_run(1e7).flops)
