"""Stage ``benchmarks``: values of the harness, paired comparisons, resuming, and digests of task files."""

import json
import math

import pytest

from lilpipe.artifact import MANIFEST, Artifact, list_files
from lilpipe.config.benchmarks import BenchmarksConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.evaluation.benchmarks import STAGE, Result, comparisons, external
from lilpipe.model.hub import save_model
from lilpipe.schemas.tables import read_rows
from lilpipe.stage import Workspace
from tests.artifacts import make_manifest
from tests.evaluation.test_harness import CONFIG, WORDS, write_tasks
from tests.model.checkpoints import small_model, small_tokenizer

harness = pytest.importorskip("lilpipe.evaluation.harness")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = []
    for seed, name in enumerate(("base", "tuned")):
        directory = tmp_path_factory.mktemp(name)
        save_model(small_model(CONFIG, seed=seed), small_tokenizer(), directory)
        manifest = make_manifest(kind="Checkpoint", stage="sft", step=name, files=list_files(directory))
        (directory / MANIFEST).write_text(manifest.to_json())
        found.append(Artifact(str(directory), directory, manifest))
    return tuple(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, texts=WORDS)
    return folder


def run(tmp_path, models, folder, name="work", **settings):
    workspace = Workspace(tmp_path / name)
    config = BenchmarksConfig(**{"tasks": ("choices", "texts"), "include_path": str(folder), **settings})
    return workspace, STAGE.run(config, {"models": models}, workspace)


def test_values_are_the_harness_s_and_errors_are_over_questions(tmp_path, models, folder):
    workspace, metrics = run(tmp_path, models, folder)
    share = 0.0
    for model in models:
        config = BenchmarksConfig(tasks=("choices", "texts"), include_path=str(folder))
        found = harness.run_harness(model.path, config)["results"]
        name = model.manifest.step
        assert metrics[f"choices_acc/{name}"] == found["choices"]["acc,none"]
        assert metrics[f"texts_bits_per_byte/{name}"] == found["texts"]["bits_per_byte,none"]
        share = metrics[f"choices_acc/{name}"]
        assert metrics[f"choices_acc_stderr/{name}"] == pytest.approx((share * (1 - share) / 11) ** 0.5)
        assert f"texts_bits_per_byte_stderr/{name}" not in metrics
    rows = list(read_rows(workspace.output / "samples.arrow"))
    mine = [row["value"] for row in rows if row["model"] == "tuned" and row["metric"] == "acc"]
    assert len(mine) == 12
    assert sum(mine) / 12 == metrics["choices_acc/tuned"]
    page = (workspace.report / "report.html").read_text()
    assert "Compared with base" in page
    assert json.loads((workspace.output / "metrics.json").read_text())["tuned"]["choices_acc"] == share


def test_finished_tasks_are_not_run_again(tmp_path, models, folder, monkeypatch):
    workspace, expected = run(tmp_path, models, folder)
    kept = sorted(workspace.scratch.iterdir())
    assert len(kept) == 4
    kept[0].unlink()
    calls = []
    real = harness.run_harness
    monkeypatch.setattr(harness, "run_harness", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    assert run(tmp_path, models, folder)[1] == expected
    assert len(calls) == 1


def results(values, higher=True):
    rows = [{"metric": "acc", "question": n, "value": float(value)} for n, value in enumerate(values)]
    return {"t": Result({"acc": sum(values) / len(values)}, {"acc": higher}, rows, "1")}


def test_better_only_beyond_twice_the_paired_error():
    base = [0, 1] * 20
    clearly = [1, 1] * 10 + [0, 1] * 10
    hardly = [1, *base[1:]]
    found = comparisons({"base": results(base), "a": results(clearly), "b": results(hardly)}, "base")
    assert [each.word for each in found] == ["better", "no difference within the noise"]
    assert found[0].difference.value == pytest.approx(0.25)


def test_lower_is_better_turns_the_sign():
    found = comparisons({"base": results([1] * 30, higher=False), "a": results([0] * 29 + [1], higher=False)}, "base")
    assert found[0].word == "better"


def test_other_questions_are_an_error():
    with pytest.raises(DataError, match="were asked different questions"):
        comparisons({"base": results([0, 1]), "a": results([0, 1, 1])}, "base")


def test_no_tasks_are_an_error(tmp_path, models, folder):
    with pytest.raises(ConfigError, match=r"benchmarks\.tasks: got none"):
        run(tmp_path, models, folder, tasks=())


def test_task_files_and_their_data_are_in_the_fingerprint(tmp_path, folder):
    config = BenchmarksConfig(tasks=("choices",), include_path=str(folder))
    before = external(config)
    assert {"choices.yaml", "answers.yaml", "choices.jsonl", "data choices.jsonl"} <= before.keys()
    with (folder / "choices.jsonl").open("a") as file:
        file.write("\n")
    assert external(config)["data choices.jsonl"] != before["data choices.jsonl"]
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"bad\.yaml: is not valid YAML"):
        external(BenchmarksConfig(include_path=str(tmp_path)))
    with pytest.raises(DataError, match=r"benchmarks\.include_path: .* is not a folder"):
        external(BenchmarksConfig(include_path=str(tmp_path / "none")))


def test_a_continuation_inside_of_a_token_is_encoded_on_its_own():
    model = harness.HarnessModel(small_model(CONFIG), small_tokenizer())
    _context, continuation = model._encode_pair("in a t", "h")  # "th" is one token
    assert continuation == small_tokenizer().encode("h")
    assert model._encode_pair("in a", " thing")[1] == small_tokenizer().encode(" thing")


def test_perplexity_is_compared_by_the_log_likelihood_of_each_question(tmp_path, models, folder):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"{word} is", "a": " so."}) + "\n" for word in WORDS))
    (tmp_path / "likely.yaml").write_text(
        f"""task: likely
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity}}]
"""
    )
    _, metrics = run(tmp_path, models, tmp_path, tasks=("likely",))
    for model in models:
        name = model.manifest.step
        perplexity, mean = (metrics[f"likely_{metric}/{name}"] for metric in ("perplexity", "log_likelihood"))
        assert perplexity == pytest.approx(math.exp(-mean))
        assert metrics[f"likely_log_likelihood_stderr/{name}"] > 0
    difference = metrics["likely_log_likelihood/tuned"] - metrics["likely_log_likelihood/base"]
    log = (tmp_path / "work" / "events.jsonl").read_text()
    assert f"{difference:+.3f}" in log
