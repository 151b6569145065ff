"""What runs again and what is cached; failures, kills and concurrent runs."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lilpipe.artifact import damage, read_manifest
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ArtifactError, ConfigError, DataError, StageFailure, StoreError
from lilpipe.pipeline.plan import external_digests, plan
from lilpipe.pipeline.run import run_step
from lilpipe.stage import get_stage
from lilpipe.store import Store
from tests.artifacts import make_manifest
from tests.conftest import toy_config
from tests.pipeline.toy_runs import run_all, runs


def test_a_second_run_finds_everything_cached(store, faults):
    config = toy_config()
    (first, cached), (second, _) = run_all(config, store)
    assert not cached
    assert (second.path / "read").read_text() == "HALF 0, WHOLE, 300"
    again = run_all(config, store)
    assert [cached for _, cached in again] == [True, True]
    assert [artifact.manifest for artifact, _ in again] == [first.manifest, second.manifest]
    assert runs(faults) == 1


def test_a_stage_knows_its_inputs_by_the_steps_of_its_own_pipeline(store, faults):
    run_all(toy_config(), store)
    steps = {"another": {"stage": "prompts"}, "second": {"stage": "tokenizer", "inputs": {"prompts": "another"}}}
    (_, cached), (second, is_stale) = run_all(toy_config(steps=steps), store)
    assert cached  # made as the step `first`
    assert not is_stale  # what it says of its input is another thing under another name
    assert (second.path / "report" / "source").read_text() == "another"


def test_the_manifest_names_all_that_the_artifact_came_from(store, faults):
    (first, _), (second, _) = run_all(toy_config(), store)
    manifest = second.manifest
    (entry,) = manifest.inputs["prompts"]
    assert entry.uri == first.uri
    assert entry.content_digest == first.content_digest
    assert manifest.config["vocab_size"] == 32_768
    assert manifest.environment["world_size"] == 1
    assert set(first.manifest.files) >= {"data", "report/report.html", "logs/events.jsonl"}
    assert first.manifest.metrics == {"loss": 1.0}
    assert damage(first.path, first.manifest) == {}


def test_reports_and_logs_are_not_content(tmp_path, faults):
    (one, _), _ = run_all(toy_config(), Store(str(tmp_path / "one")))
    (two, _), _ = run_all(toy_config(), Store(str(tmp_path / "two")))
    assert one.manifest.files["report/report.html"] != two.manifest.files["report/report.html"]
    assert one.content_digest == two.content_digest


def test_a_changed_setting_reruns_what_follows_only_if_the_content_changed(store, faults):
    run_all(toy_config(), store)
    changed = toy_config(prompts={"num_validation": 7})
    assert [p.status for p in plan(changed, store).values()] == ["run", "waits"]
    assert plan(changed, store)["first"].reason == "config num_validation: 300 -> 7"
    assert [cached for _, cached in run_all(changed, store)] == [False, False]
    # num_test is part of the fingerprint, but the toy writes the same bytes: what follows stays cached.
    same_bytes = toy_config(prompts={"num_test": 9})
    assert [cached for _, cached in run_all(same_bytes, store)] == [False, True]


def test_a_step_is_compared_with_its_nearest_earlier_run(store, faults):
    for settings in ({"num_validation": 7}, {"num_validation": 8, "num_test": 9}):
        run_step(toy_config(prompts=settings), "first", store=store, pipeline_run="run")
    planned = plan(toy_config(prompts={"num_validation": 7, "seed": 1}), store)["first"]
    assert planned.reason == "config seed: 0 -> 1"


def test_metrics_that_are_not_numbers_survive_the_manifest(tmp_path):
    metrics = {"loss": float("nan"), "perplexity": float("inf"), "accuracy": 0.5}
    manifest = make_manifest(kind="Report", stage="evaluate", metrics=metrics)
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert str(read_manifest(tmp_path).metrics) == str(metrics)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("bad-data", DataError, "docs.jsonl: no documents; name another file"),
        ("disk-full", StoreError, "the disk is full; free some space"),
        ("fail", StageFailure, "a planted bug"),
        ("kill", StageFailure, "killed by SIGKILL"),
    ],
)
def test_a_failure_is_told_apart_and_the_next_run_goes_on_from_there(store, faults, files, fault, error, message):
    (faults / fault).touch()
    with pytest.raises(error) as caught:
        run_all(toy_config(), store)
    assert message in str(caught.value)
    assert not files.under("artifacts")
    (faults / fault).unlink()
    (first, cached), _ = run_all(toy_config(), store)
    assert not cached
    assert len((faults / "first-halves").read_text()) == 1  # what had been paid for was kept
    assert first.manifest.elapsed_seconds > 0
    assert not [name for name in first.manifest.files if name.endswith(".tmp")]
    assert not list((store.local / "work" / "prompts").iterdir())


def test_unfinished_work_under_other_settings_is_named_and_kept(store, faults):
    (faults / "fail").touch()
    with pytest.raises(StageFailure):
        run_all(toy_config(), store)
    assert plan(toy_config(), store)["first"].reason == "resumes from where it was interrupted"
    changed = toy_config(prompts={"num_validation": 200})
    assert plan(changed, store)["first"].reason == (
        "from the start: unfinished work has other settings (config num_validation: 300 -> 200)"
    )
    (faults / "fail").unlink()
    run_all(changed, store)
    assert plan(toy_config(), store)["first"].reason == "resumes from where it was interrupted"


def test_a_killed_parent_takes_its_workers_along_and_leaves_the_store_usable(store, faults, tmp_path):
    (faults / "hang").touch()
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\nfrom lilpipe import stage\nfrom tests.conftest import toy_config\n"
        "from lilpipe.pipeline.run import run_step\nfrom lilpipe.store import Store\n"
        "stage.STAGES['prompts'] = 'tests.toy'\nstage.STAGES['tokenizer'] = 'tests.toy_reader'\n"
        "run_step(toy_config(), 'first', store=Store(sys.argv[1]), pipeline_run='r')\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(script), store.root],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "LILPIPE_LOCAL": str(store.local)},
    )
    wait_for(lambda: runs(faults) == 1)
    (worker,) = children(parent.pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text())
    (faults / "hang").unlink()
    assert [cached for _, cached in run_all(toy_config(), store)] == [False, False]
    assert len((faults / "first-halves").read_text()) == 1


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_two_runs_at_once_do_the_work_once(store, faults):
    results = []
    threads = [
        threading.Thread(
            target=lambda n=n: results.append(run_step(toy_config(), "first", store=store, pipeline_run=f"{n}"))
        )
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(cached for _, cached in results) == [False, True]
    assert runs(faults) == 1


def test_a_lone_step_needs_those_before_it(store, faults):
    with pytest.raises(ArtifactError, match=r"not built yet: first \(never run\)"):
        run_step(toy_config(), "second", store=store, pipeline_run="run")
    with pytest.raises(ConfigError, match="there is no such step; known: first, second"):
        run_step(toy_config(), "third", store=store, pipeline_run="run")
    run_step(toy_config(), "first", store=store, pipeline_run="run")
    _, cached = run_step(toy_config(), "second", store=store, pipeline_run="another")
    assert not cached


def test_wrong_wiring_is_refused_before_anything_runs(store, faults):
    for inputs, message in [
        ({}, "prompts missing"),
        ({"prompts": "first", "models": "first"}, "got models; stage tokenizer accepts prompts"),
        ({"prompts": ["first", "first"]}, "inputs.prompts: got 2 steps, expected one: first, first"),
        ({"prompts": []}, "inputs.prompts: got 0 steps, expected one"),
    ]:
        steps = {"first": {"stage": "prompts"}, "second": {"stage": "tokenizer", "inputs": inputs}}
        with pytest.raises(ConfigError, match=message):
            plan(toy_config(steps=steps), store)
    steps = {
        "a": {"stage": "prompts"},
        "b": {"stage": "tokenizer", "inputs": {"prompts": "a"}},
        "c": {"stage": "tokenizer", "inputs": {"prompts": "b"}},
    }
    with pytest.raises(ConfigError, match="step b makes a Tokenizer, expected a Prompts"):
        plan(toy_config(steps=steps), store)
    assert runs(faults) == 0


def test_refs_say_what_a_pipeline_run_used(store, faults):
    (first, _), (second, _) = run_all(toy_config(), store)
    refs = store.refs("run")
    assert {name: ref["uri"] for name, ref in refs.items()} == {"first": first.uri, "second": second.uri}


def test_listeners_hear_what_happens_in_order(store, faults):
    heard = []

    class Ear:
        def stage_started(self, step, planned):
            heard.append(("started", step, planned.reason))

        def stage_event(self, step, event):
            heard.append(("event", step, event["metrics"]["loss"]))

        def stage_finished(self, step, artifact, *, cached, seconds):
            heard.append(("finished", step, cached))

        def stage_failed(self, step, error):
            heard.append(("failed", step, type(error).__name__))

    run_step(toy_config(), "first", store=store, pipeline_run="run", listeners=[Ear()])
    run_step(toy_config(), "first", store=store, pipeline_run="run", listeners=[Ear()])
    assert heard == [
        ("started", "first", "never run"),
        ("event", "first", 2.0),
        ("event", "first", 1.0),
        ("finished", "first", False),
        ("finished", "first", True),
    ]


def test_an_adapter_that_training_starts_from_is_part_of_the_fingerprint(store, tmp_path):
    config = PipelineConfig(recipe="tiny", sft={"lora": {"path": str(tmp_path)}})  # type: ignore[arg-type] (coerced)
    with pytest.raises(DataError, match=r"sft.lora.path: .*: adapter_config.json cannot be read \(No such file"):
        list(plan(config, store))
    found = []
    for text in ("{}", "{ }"):
        (tmp_path / "adapter_config.json").write_text(text)
        (tmp_path / "adapter_model.safetensors").touch()
        found.append(external_digests(get_stage("sft"), config.sft))
    assert found[0].keys() == {"lora adapter_config.json", "lora adapter_model.safetensors"}
    assert found[0] != found[1]
    assert external_digests(get_stage("sft"), PipelineConfig(recipe="tiny").sft) == {}
