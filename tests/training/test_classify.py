import json

import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel import ParallelConfig
from lilpipe.config.reward_model import ClassifyConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.heads import load_head_model, read_labels
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import PROMPT_SCHEMA, Prompt
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.training import classify
from lilpipe.training.classify import external, run
from lilpipe.training.confusion import confusion_metrics, precision_recall_f1
from lilpipe.training.labelled_texts import LabelledText, is_validation, read_texts
from tests.alignment.conftest import as_artifact, digest_of

SIZE = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=48)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)
    network = Transformer(SIZE, tokenizer.vocab_size)
    network.init_weights(0)
    directory = tmp_path_factory.mktemp("model")
    save_model(network, tokenizer, directory)
    return as_artifact(directory, kind="Checkpoint", stage="pretrain")


@pytest.fixture
def model(checkpoint, monkeypatch):
    """The same where nothing is drawn, which takes longer than training here."""
    monkeypatch.setattr(classify, "write_report", lambda *args, **options: None)
    monkeypatch.setattr(classify, "_sections", lambda *args, **options: {})
    return checkpoint


def messages(count=60):
    spam = [{"text": f"Win ${i}00 now!!! Call {i * 37}", "label": "spam"} for i in range(count // 2)]
    return spam + [{"text": f"See you at {i} o'clock, {i * 91}", "label": "ham"} for i in range(count // 2)]


@pytest.fixture
def write(tmp_path):
    def to_file(rows):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return to_file


def config(path, **settings):
    values = {"seed": 0, "batch_size": 8, "num_epochs": 5, "checkpoint_every": 3, "log_every": 1}
    return ClassifyConfig(**{**values, "optimizer": OPTIMIZER, "path": path, **settings})


def test_spam_is_told_from_ham_in_texts_held_out_and_the_report_shows_how(tmp_path, checkpoint, write):
    settings = config(write(messages(160)))
    metrics = run(settings, {"model": checkpoint}, Workspace(tmp_path))
    assert metrics["validation_accuracy"] > 0.9
    assert metrics["validation_macro_f1"] > 0.9
    assert 0.4 < metrics["largest_class_ratio"] < 0.7
    assert metrics["texts"] + metrics["validation_texts"] == 160
    loaded, tokenizer = load_head_model(tmp_path / "output")
    assert read_labels(tmp_path / "output") == ["ham", "spam"]
    with torch.no_grad():
        outputs = loaded(torch.tensor([tokenizer.encode("Win $999 now!!! Call 5")]))[0, -1]
    assert outputs.argmax() == 1
    html = (tmp_path / "output" / "report" / "report.html").read_text()
    for part in ("Confusion matrix", "predicted spam", "precision", "Classes"):
        assert part in html


def test_questions_are_classified_by_family_where_no_file_is_named(tmp_path):
    prompts = [("train", Prompt("1", "sort", "Sort 2 1.", "1 2")), ("test", Prompt("2", "copy", "Copy 1.", "1"))]
    rows = [{**vars(prompt), "split": split} for split, prompt in prompts]
    write_rows(tmp_path / "prompts.arrow", rows, PROMPT_SCHEMA)
    found = read_texts(config(None), {"prompts": as_artifact(tmp_path, kind="Prompts")})
    assert found == [LabelledText("Sort 2 1.", "sort")]


def test_what_is_frozen_stays_and_the_rest_moves(tmp_path, model, write):
    settings = config(write(messages()), num_epochs=1, frozen_layers=1, freeze_embedding=True)
    metrics = run(settings, {"model": model}, Workspace(tmp_path))
    before = load_model(model.path)[0].model.state_dict()
    trained, _ = load_head_model(tmp_path / "output")
    after = trained.model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("embed_tokens.", "layers.0."))}
    moved = sum(after[name].numel() for name in before if name not in same)
    assert metrics["trained_parameters"] == moved + trained.score.weight.numel()


@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path, model, write, monkeypatch, killed_at):
    settings = config(write(messages()), num_epochs=1, frozen_layers=1)
    run(settings, {"model": model}, Workspace(tmp_path / "whole"))
    killed = Workspace(tmp_path / "killed")
    progress = killed.progress

    def dying(done, total, unit="steps", **metrics):
        if done == killed_at:
            raise KeyboardInterrupt
        progress(done, total, unit, **metrics)

    monkeypatch.setattr(killed, "progress", dying)
    with pytest.raises(KeyboardInterrupt):
        run(settings, {"model": model}, killed)
    run(settings, {"model": model}, Workspace(tmp_path / "killed"))
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))


# --- measuring ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    matrix = [[5, 1, 0], [2, 7, 0], [3, 0, 0]]
    true = [i for i in range(3) for count in matrix[i] for _ in range(count)]
    predicted = [j for row in matrix for j, count in enumerate(row) for _ in range(count)]
    assert metrics.confusion_matrix(true, predicted).tolist() == matrix
    got = confusion_metrics(matrix)
    assert got["validation_accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    assert got["validation_macro_f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    expected = metrics.precision_recall_fscore_support(true, predicted, zero_division=0)
    for label in range(3):
        assert precision_recall_f1(matrix, label) == pytest.approx([column[label] for column in expected[:3]])


def test_macro_f1_is_worked_out_by_hand():
    assert precision_recall_f1([[3, 1], [2, 4]], 0) == pytest.approx((3 / 5, 3 / 4, 2 / 3))
    got = confusion_metrics([[3, 1], [2, 4]])
    assert got["validation_accuracy"] == pytest.approx(0.7)
    assert got["validation_accuracy_stderr"] == pytest.approx((0.7 * 0.3 / 10) ** 0.5)
    assert got["validation_macro_f1"] == pytest.approx((2 / 3 + 8 / 11) / 2)


def test_a_text_is_held_out_by_what_it_says():
    texts = [f"text {i}" for i in range(2_000)]
    held = [text for text in texts if is_validation(text, 0.2)]
    assert 330 < len(held) < 470
    assert all(is_validation(text.upper().replace(" ", "  "), 0.2) for text in held)


# --- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*messages(), {"text": "SEE you at 1 o'clock, 91", "label": "spam"}],
            "1 of 61 texts occur with two labels",
        ),
        ([{"text": f"a{i}", "label": "ham"} for i in range(30)], r"got the labels \['ham'\] in 30 texts"),
        ([*messages(), {"text": "once", "label": "rare"}], "texts has the label 'rare'"),
        (messages(20), "expected at least one batch of 32"),
        ([*messages(), {"text": "no label"}], r"texts.jsonl:61: got .*expected a JSON object with 'text' and 'label'"),
        ([*messages(), {"text": " ", "label": "ham"}], "texts.jsonl:61: got text ' '"),
        ([*messages(), {"text": "a", "label": None}], "texts.jsonl:61: got text 'a' and label None"),
    ],
    ids=["contradiction", "one label", "rare", "few", "no label", "empty", "null"],
)
def test_texts_that_cannot_be_learnt_from_are_refused(tmp_path, model, write, rows, message):
    with pytest.raises(DataError, match=message):
        run(config(write(rows), batch_size=32), {"model": model}, Workspace(tmp_path))


def test_texts_that_are_too_long_are_left_out_whole_and_counted(tmp_path, model, write):
    workspace = Workspace(tmp_path)
    rows = [*messages(), {"text": "long " * 20, "label": "ham"}]
    metrics = run(config(write(rows), num_epochs=1), {"model": model}, workspace)
    assert metrics["texts"] + metrics["validation_texts"] == 60
    assert "skipped 1 of 61 texts of more than 48 tokens" in workspace.events.read_text()


def test_more_frozen_layers_than_there_are_is_refused(tmp_path, model, write):
    with pytest.raises(ConfigError, match="frozen_layers: got 3, the model has 2 blocks"):
        run(config(write(messages()), frozen_layers=3), {"model": model}, Workspace(tmp_path))


def test_a_pipeline_in_which_a_stage_may_have_nothing_to_train_is_refused():
    match = "parallel.pipeline: got 2 with frozen_layers 1 and freeze_embedding False, expected 1"
    with pytest.raises(ValueError, match=match):
        ClassifyConfig(frozen_layers=1, num_workers=2, parallel=ParallelConfig(pipeline=2))


def test_a_step_without_texts_is_refused(tmp_path, model):
    with pytest.raises(ConfigError, match="got none, and the step has no input `prompts`"):
        run(config(None), {"model": model}, Workspace(tmp_path))


def test_the_files_digest_is_part_of_the_identity_and_a_missing_file_is_told_of(write):
    first = external(config(write(messages(20))))
    second = external(config(write(messages(22))))
    assert first["texts"] != second["texts"]
    assert external(config(None)) == {}
    with pytest.raises(DataError, match="cannot be read"):
        external(config("/nowhere/texts.jsonl"))
