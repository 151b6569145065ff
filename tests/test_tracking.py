import json
from typing import Any

import pytest

from lilpipe.pipeline.run import run_step
from lilpipe.pipeline.run_names import latest_pipeline_run, new_pipeline_run
from lilpipe.store import Store
from lilpipe.tracking import MLflowTracker
from lilpipe.tracking.client import batches
from lilpipe.tracking.events import flatten, read_events
from lilpipe.tracking.mlflow_runs import EXPERIMENT
from tests.flows import toys


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a store and an MLflow database; making a database takes seconds, so the tests share one."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        toys.install(patch, folder)
        yield folder


def track(config, store, *, pipeline_run=None, steps=None):
    tracker = MLflowTracker(config, pipeline_run=pipeline_run or new_pipeline_run(config), store=store)
    for step in steps or config.steps:
        run_step(config, step, store=store, pipeline_run=tracker.pipeline_run, listeners=[tracker])
    tracker.close()
    return tracker


@pytest.fixture(scope="module")
def store(place):
    return Store(str(place / "store"))


@pytest.fixture(scope="module")
def first(place, store):
    """A pipeline run in which every step ran."""
    return track(toys.toy_config(), store)


def children(tracker) -> dict[str, Any]:
    runs = tracker.runs
    nested = f"tags.`mlflow.parentRunId` = '{runs.parent_id}'"
    found = runs.client.search_runs([runs.experiment_id], nested, order_by=["start_time ASC"])
    return {run.info.run_name: runs.client.get_run(run.info.run_id) for run in found}


def test_a_pipeline_run_has_a_parent_run_and_a_nested_run_for_each_step(first):
    parent = first.runs.client.get_run(first.runs.parent_id)
    assert parent.info.run_name == "tiny, seed 0"
    assert parent.info.status == "FINISHED"
    assert list(children(first)) == ["corpus", "pretrain", "sft", "register"]
    assert {run.info.status for run in children(first).values()} == {"FINISHED"}
    assert {run.data.tags["cached"] for run in children(first).values()} == {"false"}


def test_settings_are_flattened_into_parameters(first):
    params = children(first)["pretrain"].data.params
    assert params["model.hidden_size"] == "96"
    assert params["optimizer.kind"] == "muon"
    assert params["seed"] == "0"


def test_metrics_are_kept_by_step_each_step_once(first):
    run = children(first)["sft"]
    history = first.runs.client.get_metric_history(run.info.run_id, "loss")
    assert sorted({(point.step, point.value) for point in history}) == [(n, 8.0 / 2**n) for n in range(1, 11)]
    assert len([point for point in history if point.step < 10]) == 9


def test_input_artifacts_are_datasets_with_their_digests(first, store):
    corpus, pretrain = children(first)["corpus"], children(first)["pretrain"]
    (given,) = pretrain.inputs.dataset_inputs
    digest = corpus.data.tags["content_digest"]
    assert given.dataset.name == "corpus"
    assert digest.startswith(given.dataset.digest)
    assert json.loads(given.dataset.source)["content_digest"] == digest
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "corpus"}


def test_manifest_and_report_are_artifacts_of_the_run(first):
    run_id = children(first)["corpus"].info.run_id
    assert {file.path for file in first.runs.client.list_artifacts(run_id)} == {"manifest.json", "report"}
    assert [file.path for file in first.runs.client.list_artifacts(run_id, "report")] == ["report/report.html"]


def test_a_checkpoint_is_the_output_of_its_run_and_the_input_of_the_next(first):
    runs = children(first)
    (pretrained,) = runs["pretrain"].outputs.model_outputs
    (given,) = runs["sft"].inputs.model_inputs
    (tuned,) = runs["sft"].outputs.model_outputs
    assert given.model_id == pretrained.model_id != tuned.model_id
    model = first.runs.client.get_logged_model(tuned.model_id)
    assert model.source_run_id == runs["sft"].info.run_id
    assert {metric.key: metric.value for metric in model.metrics or []}["loss"] == 8.0 / 2**10


def test_descriptions_lead_from_the_registered_version_to_the_corpus_report(first):
    runs = children(first)
    page = f"#/experiments/{first.runs.experiment_id}/runs/"
    (version,) = first.runs.client.search_model_versions("name = 'lilpipe'")
    assert version.run_id == runs["register"].info.run_id
    assert page + version.run_id in version.description
    assert page + first.runs.parent_id in version.description
    for step, upstream in (("register", "sft"), ("sft", "pretrain"), ("pretrain", "corpus")):
        assert f"[{upstream}]({page}{runs[upstream].info.run_id})" in runs[step].data.tags["mlflow.note.content"]
    report = f"{page}{runs['corpus'].info.run_id}/artifacts/report/report.html"
    assert report in runs["corpus"].data.tags["mlflow.note.content"]
    assert report in first.runs.client.get_run(first.runs.parent_id).data.tags["mlflow.note.content"]


def test_a_cached_step_links_to_the_run_that_made_it_and_registers_no_new_version(first, store):
    again = track(toys.toy_config(), store)
    before, after = children(first), children(again)
    assert again.runs.parent_id != first.runs.parent_id
    for step, run in after.items():
        assert run.data.tags["cached"] == "true"
        assert before[step].info.run_id in run.data.tags["mlflow.note.content"]
    assert after["sft"].data.metrics["loss"] == before["sft"].data.metrics["loss"]
    assert not after["sft"].outputs.model_outputs
    assert len(first.runs.client.search_model_versions("name = 'lilpipe'")) == 1


def test_the_alias_follows_the_latest_registration_and_the_version_holds_the_files(first, store, place):
    second = track(toys.toy_config(**{"sft.seed": 5}), store)
    third = track(toys.toy_config(), store)
    champion = first.runs.client.get_model_version_by_alias("lilpipe", "champion")
    assert len(first.runs.client.search_model_versions("name = 'lilpipe'")) == 2
    assert champion.run_id == children(first)["register"].info.run_id
    assert children(second)["pretrain"].data.tags["cached"] == "true"
    assert children(third)["register"].data.tags["cached"] == "true"
    files = place / ".lilpipe" / "mlartifacts"
    model_id = children(first)["register"].data.tags["model_id"]
    location = first.runs.client.get_logged_model(model_id).artifact_location
    assert (place / location.removeprefix("file://") / "model.txt").read_text().startswith("seed 0")
    assert files.exists()


def test_after_a_failure_the_run_is_reopened_and_the_curve_has_no_gap_and_no_repetition(first, store, place):
    config = toys.toy_config(**{"sft.seed": 6})
    name = new_pipeline_run(config)
    (place / "sft").touch()
    with pytest.raises(RuntimeError, match="injected failure"):
        track(config, store, pipeline_run=name)
    (place / "sft").unlink()
    failed = MLflowTracker(config, pipeline_run=name, store=store)
    failed.runs.open()
    broken = children(failed)["sft"]
    assert broken.info.status == "FAILED"
    assert "injected failure" in broken.data.tags["error"]
    tracker = track(config, store, pipeline_run=name)
    run = children(tracker)["sft"]
    assert (run.info.run_id, run.info.status) == (broken.info.run_id, "FINISHED")
    history = tracker.runs.client.get_metric_history(run.info.run_id, "loss")
    assert sorted({point.step for point in history}) == list(range(1, 11))
    assert len([point for point in history if point.step < 10]) == 9


def test_a_new_pipeline_run_receives_what_an_earlier_one_recorded_before_it_failed(first, store, place):
    config = toys.toy_config(**{"sft.seed": 7})
    (place / "sft").touch()
    with pytest.raises(RuntimeError, match="injected failure"):
        track(config, store)
    (place / "sft").unlink()
    tracker = track(config, store)
    history = tracker.runs.client.get_metric_history(children(tracker)["sft"].info.run_id, "loss")
    assert sorted({point.step for point in history}) == list(range(1, 11))


def test_a_tracker_that_cannot_be_reached_costs_no_stage_and_is_made_up_for(first, store, place, monkeypatch, caplog):
    config = toys.toy_config(**{"sft.seed": 8})
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        tracker = MLflowTracker(config, pipeline_run="unreached", store=store)
        artifact, cached = run_step(config, "sft", store=store, pipeline_run="unreached", listeners=[tracker])
    assert not cached
    assert artifact.path.exists()
    assert "127.0.0.1:9" in caplog.text
    assert "its artifact is not affected" in caplog.text
    late = track(config, store, steps=["sft"])
    run = children(late)["sft"]
    assert (run.data.tags["cached"], run.data.tags["origin"]) == ("true", "true")
    assert len(late.runs.client.get_metric_history(run.info.run_id, "loss")) >= 10
    assert run.outputs.model_outputs


def test_all_is_in_one_experiment_whose_files_lie_beside_the_database(first, place):
    experiment = first.runs.client.get_experiment_by_name(EXPERIMENT)
    assert experiment.artifact_location == (place / ".lilpipe" / "mlartifacts").as_uri()
    assert not (place / "mlruns").exists()


def test_the_latest_pipeline_run_is_of_the_same_configuration(first, store):
    config = toys.toy_config(**{"sft.seed": 9})
    assert latest_pipeline_run(config, store) is None
    assert latest_pipeline_run(toys.toy_config(), store) >= first.pipeline_run
    assert latest_pipeline_run(toys.toy_config(**{"orchestration.retries": 9}), store) >= first.pipeline_run


def test_events_are_merged_by_step_and_a_torn_line_is_left_out(tmp_path):
    lines = [
        {"time": 1, "done": 1, "total": 2, "unit": "steps", "metrics": {"loss": 3.0}},
        {"time": 2, "message": "hello"},
        {"time": 3, "done": 1, "total": 2, "unit": "steps", "metrics": {"loss": 2.0, "lr": 1.0}},
        {"time": 4, "done": 1, "total": 2, "unit": "steps", "metrics": {"bits": 0.5}},
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"time": 5, "done": 2, "me')
    (event,) = read_events(path)
    assert event["metrics"] == {"loss": 2.0, "lr": 1.0, "bits": 0.5}
    assert read_events(tmp_path / "absent") == []


def test_flattening_keeps_every_leaf():
    values = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": "x", "g": {}}
    assert dict(flatten(values)) == {"a.b": "1", "a.c.d": "null", "e": "[1, 2]", "f": "x", "g": "{}"}
    assert [list(batch) for batch in batches([1, 2, 3], 2)] == [[1, 2], [3]]
