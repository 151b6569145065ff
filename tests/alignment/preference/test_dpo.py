import json

import pytest
import torch
import torch.nn.functional as F

from lilpipe.alignment.preference import dpo
from lilpipe.alignment.preference.data import (
    Packer,
    as_examples,
    encode_examples,
    encode_pairs,
    in_rounds,
    with_mismatched,
)
from lilpipe.alignment.preference.dpo import run
from lilpipe.alignment.preference.evaluation import score_completions
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.hub import load_model
from lilpipe.schemas.examples import read_prompts
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import EXAMPLE_SCHEMA, PAIR_SCHEMA, Pair, UnpairedExample
from lilpipe.schemas.tables import read_rows, write_rows
from lilpipe.stage import Workspace
from tests.alignment.conftest import TINY, as_artifact, digest_of

CONFIG = DPOConfig(seed=0, batch_size=4, num_epochs=3, log_every=1)
FAST = {"optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)}
LOSSES = ("sigmoid", "ipo", "orpo", "simpo", "kto")


def question(text) -> list[Message]:
    return [{"role": "user", "content": text}]


def pair(index, split="train", **changes):
    values = {
        "prompt_id": f"{split}/{index}",
        "split": split,
        "prompt": question(f"Copy {index}."),
        "chosen": f"Answer: {index}",
        "rejected": f"Sure, I can. Answer: {index}",
    }
    return Pair(**values | changes)


def config_of(**changes):
    return DPOConfig(**CONFIG.model_dump() | changes)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than training here; one test draws it."""
    monkeypatch.setattr("lilpipe.alignment.preference.dpo.write_report", lambda *args, **options: None)


@pytest.fixture(scope="module")
def make_preferences(tmp_path_factory):
    def make(*extra, count=12, validation=6):
        directory = tmp_path_factory.mktemp("preferences")
        pairs = [*(pair(i) for i in range(count)), *extra, *(pair(i, "validation") for i in range(20, 20 + validation))]
        write_rows(directory / "pairs.arrow", [vars(item) for item in pairs], PAIR_SCHEMA)
        return as_artifact(directory, kind="Preferences")

    return make


@pytest.fixture(scope="module")
def preferences(make_preferences):
    return make_preferences()


@pytest.fixture(scope="module")
def unpaired(tmp_path_factory):
    """Unpaired completions, with no rejected one for most prompts."""
    directory = tmp_path_factory.mktemp("unpaired")
    train = [UnpairedExample(f"{i}", "train", question(f"Copy {i}."), f"Answer: {i}", True) for i in range(8)]
    train += [
        UnpairedExample(f"{i}", "train", question(f"Copy {i}."), f"Sure. Answer: {i}", False) for i in range(10, 14)
    ]
    validation = [
        UnpairedExample(f"h{i}", "validation", question(f"Copy {i}."), f"Answer: {i}", i < 24) for i in range(20, 26)
    ]
    write_rows(directory / "examples.arrow", [vars(item) for item in train + validation], EXAMPLE_SCHEMA)
    return as_artifact(directory, kind="Preferences")


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def train(tmp_path, checkpoint, preferences):
    def call(preferences=preferences, *, workspace=None, prompts=None, **changes):
        inputs = {"model": checkpoint, "preferences": preferences} | ({"prompts": prompts} if prompts else {})
        return run(config_of(**changes), inputs, workspace or Workspace(tmp_path))

    return call


def make_packer(tokenizer, *, packed=True, mask_formatting=True):
    return Packer(
        padding_id=tokenizer.padding_id,
        max_len=TINY.max_seq_len,
        packed=packed,
        mask_formatting=mask_formatting,
        device=torch.device("cpu"),
    )


def answer_rows(tokenizer, examples):
    kept, _ = encode_examples(tokenizer, examples, max_len=TINY.max_seq_len)
    return with_mismatched(kept, max_len=TINY.max_seq_len)


# --- log-probabilities and batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mask_formatting", [True, False])
def test_log_probabilities_cover_the_completion_alone(tokenizer, checkpoint, mask_formatting, packed):
    model, _ = load_model(checkpoint.path)
    rows, _ = encode_pairs(tokenizer, [pair(1), pair(234), pair(5)], max_len=TINY.max_seq_len)
    completions = [item for row in rows for item in (row.first, row.second)]
    packer = make_packer(tokenizer, packed=packed, mask_formatting=mask_formatting)
    sums, lengths = score_completions(model, completions, packer, CONFIG)
    for item, total, length in zip(completions, sums.tolist(), lengths.tolist(), strict=True):
        assert item.completion[-1] == tokenizer.turn_end_id
        assert item.prompt[-1] == tokenizer.assistant_id
        # One sequence at a time, without padding.
        with torch.no_grad():
            logprobs = F.log_softmax(model(torch.tensor([item.prompt + item.completion]))[0], dim=-1)
        terms = [logprobs[len(item.prompt) + k - 1, token].item() for k, token in enumerate(item.completion)]
        assert total == pytest.approx(sum(terms[:-1]) if mask_formatting else sum(terms), rel=1e-5)
        assert length == len(terms) - mask_formatting


def test_packed_rows_hold_what_fits_and_score_completions_alone(tokenizer):
    rows, _ = encode_pairs(tokenizer, [pair(i) for i in range(6)], max_len=TINY.max_seq_len)
    completions = [item for row in rows for item in (row.first, row.second)]
    batch, places = make_packer(tokenizer)(completions)
    assert len(batch.inputs) < len(completions)
    assert batch.inputs.shape[1] <= TINY.max_seq_len
    assert (batch.targets >= 0).sum() == sum(len(item.completion) for item in completions) == places.present_SA.sum()
    for index, item in enumerate(completions):
        targets = batch.targets[places.rows_S1[index], places.columns_SA[index]][places.present_SA[index]]
        assert targets.tolist() == item.completion


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nll_normalisation", ["sequence", "token"])
def test_however_a_batch_is_divided_its_loss_and_gradient_are_the_same(tokenizer, checkpoint, loss, nll_normalisation):
    pairs = [pair(i, chosen="Answer: " + str(i) * (i + 1)) for i in range(4)]
    if loss == "kto":
        rows = answer_rows(tokenizer, as_examples(pairs))
    else:
        rows, _ = encode_pairs(tokenizer, pairs * 2, max_len=TINY.max_seq_len)
    reference = torch.linspace(-60, -30, 16).view(8, 2)

    def gradient(world_size, accumulation_steps):
        model, _ = load_model(checkpoint.path)
        config = config_of(
            loss_type=loss,
            batch_size=8,
            kl_examples=2,
            accumulation_steps=accumulation_steps,
            nll_normalisation=nll_normalisation,
        )
        parameters = list(model.parameters())
        total, seen, summed = 0.0, [], [torch.zeros_like(parameter) for parameter in parameters]
        for rank in range(world_size):
            objective = PreferenceObjective(
                rows, config, make_packer(tokenizer), reference_R2=reference, rank=rank, world_size=world_size
            )
            for batch in objective.batches(3):
                part = objective.loss(
                    model(batch.inputs, targets_BT=batch.targets, documents_BT=batch.documents), batch
                )
                for tensor, grad in zip(summed, torch.autograd.grad(part.total, parameters), strict=True):
                    tensor += grad
                total += part.total.item()
                seen += batch.extra.reference_S.tolist()
        assert sorted(seen) == reference.flatten().tolist()
        return total, torch.cat([tensor.flatten() for tensor in summed])

    total, whole = gradient(1, 1)
    for world_size, accumulation_steps in ((2, 1), (1, 4), (2, 2)):
        other_total, other = gradient(world_size, accumulation_steps)
        assert other_total == pytest.approx(total, rel=1e-5)
        assert (other - whole).norm() < 1e-4 * whole.norm()


def test_mismatched_completions_are_those_of_other_prompts_each_used_once(tokenizer):
    rows = answer_rows(tokenizer, as_examples([pair(i) for i in range(5)]))
    assert all(row.second.prompt == row.first.prompt for row in rows)
    owners = {tuple(row.first.completion): row.first.prompt for row in rows}
    assert all(owners[tuple(row.second.completion)] != row.first.prompt for row in rows)
    assert {tuple(row.second.completion) for row in rows} == {tuple(row.first.completion) for row in rows}


def test_completions_to_one_prompt_in_a_row_are_mismatched_with_different_ones(tokenizer):
    listed = [
        UnpairedExample(f"{i}", "train", question(f"Copy {i}."), f"Answer {k}: {i}", k == 0)
        for i in range(3)
        for k in (0, 1)
    ]
    assert [(item.prompt_id, item.completion[7]) for item in in_rounds(listed)] == [
        ("0", "0"),
        ("1", "0"),
        ("2", "0"),
        ("0", "1"),
        ("1", "1"),
        ("2", "1"),
    ]
    rows = answer_rows(tokenizer, in_rounds(listed))
    assert len({tuple(row.second.completion) for row in rows}) == len(rows)
    assert len({tuple(row.second.completion) for row in answer_rows(tokenizer, listed)}) < len(rows)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_widens_the_margin_on_held_out_pairs(train, loss):
    beta = {"simpo": 2.0, "orpo": 1.0}.get(loss, 0.1)
    metrics = train(loss_type=loss, beta=beta, batch_size=8 if loss == "kto" else 4, num_epochs=4, **FAST)
    assert metrics["steps"] == 12
    assert metrics["validation_margin"] > metrics["validation_margin_before"] + 0.05
    assert metrics["validation_preference_accuracy"] == 1
    if loss in ("sigmoid", "ipo", "kto"):
        assert metrics["validation_preference_accuracy_before"] == 0.5
        assert metrics["validation_margin_before"] == 0


def test_kto_learns_from_completions_without_pairs(train, unpaired):
    metrics = train(unpaired, loss_type="kto", num_epochs=4, undesirable_weight=2.0, **FAST)
    assert (metrics["completions"], metrics["validation_completions"]) == (12, 6)
    assert metrics["validation_reward_chosen"] > 0
    assert metrics["validation_preference_accuracy_before"] == 0.5


def test_without_the_preference_loss_the_likelihood_term_alone_is_learnt(train):
    metrics = train(preference_coefficient=0.0, rpo_alpha=1.0)
    assert metrics["validation_chosen_change"] > 0
    assert metrics["chosen_fall_alarm"] == 0


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_the_reference_is_computed_once_and_stored(tmp_path, train, tokenizer, checkpoint, monkeypatch, loss):
    workspace = Workspace(tmp_path)
    train(loss_type=loss, num_epochs=1, workspace=workspace)
    table = read_rows(workspace.output / "reference.arrow")
    pairs = [pair(i) for i in range(12)]
    rows, _ = encode_pairs(tokenizer, pairs, max_len=TINY.max_seq_len)
    if loss == "kto":
        rows = answer_rows(tokenizer, as_examples(pairs))
    model, _ = load_model(checkpoint.path)
    expected, _ = score_completions(model, [row.second for row in rows], make_packer(tokenizer), CONFIG)
    column = "mismatched_completion" if loss == "kto" else "rejected"
    assert [row["prompt_id"] for row in table] == [row.prompt_id for row in rows]
    assert [row[column] for row in table] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_a_reference_compute_none(tmp_path, train, monkeypatch, loss):
    monkeypatch.setattr(dpo, "compute_reference", None)
    workspace = Workspace(tmp_path)
    train(loss_type=loss, num_epochs=1, workspace=workspace)
    assert not (workspace.output / "reference.arrow").exists()


@pytest.mark.parametrize(("loss", "killed_at"), [("sigmoid", 3), ("kto", 3)])
def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path, train, monkeypatch, loss, killed_at):
    settings = {
        "loss_type": loss,
        "num_epochs": 2,
        "checkpoint_every": 2,
        "accumulation_steps": 1 if loss == "kto" else 2,
    }
    train(workspace=Workspace(tmp_path / "whole"), **settings)
    killed = Workspace(tmp_path / "killed")
    progress = killed.progress

    def dying(done, total, unit="steps", **metrics):
        if unit == "steps" and done == killed_at:
            raise KeyboardInterrupt
        progress(done, total, unit, **metrics)

    monkeypatch.setattr(killed, "progress", dying)
    with pytest.raises(KeyboardInterrupt):
        train(workspace=killed, **settings)
    train(workspace=Workspace(tmp_path / "killed"), **settings)
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))


def test_the_report_shows_curves_and_completions_before_and_after(tmp_path, train, monkeypatch):
    sections = {}
    monkeypatch.setattr(dpo, "write_report", lambda *_, **options: sections.update(options["sections"]))
    train(num_epochs=1)
    curves, examples = ("".join(fragments) for fragments in sections.values())
    assert "<svg" in curves
    assert "Copy 20." in examples
    assert "Sure, I can. Answer: 20" in examples


# --- gates: planted faults ----------------------------------------------------------------------------------------

UNLEARNING = {
    "rpo_alpha": 0.0,
    "beta": 1.0,
    "optimizer": OptimizerConfig(learning_rate=3e-2, warmup_steps=0, weight_decay=0.0),
}


def test_a_falling_likelihood_of_chosen_completions_raises_the_alarm(tmp_path, train):
    workspace = Workspace(tmp_path)
    metrics = train(workspace=workspace, **UNLEARNING)
    assert metrics["validation_chosen_change"] < -1
    assert metrics["chosen_fall_alarm"] == 1
    assert metrics["chosen_fall_alarm_before"] == 0
    assert "the log-probability of chosen validation completions fell by" in workspace.events.read_text()


def test_a_fall_beyond_the_limit_ends_the_stage_and_says_what_to_do(tmp_path, train):
    workspace = Workspace(tmp_path)
    with pytest.raises(DataError, match=r"fell by .*, expected at most dpo.max_chosen_fall = 0.5: .*dpo.rpo_alpha"):
        train(workspace=workspace, max_chosen_fall=0.5, **UNLEARNING)
    assert not (workspace.output / "config.json").exists()


def test_a_limit_that_nothing_is_measured_against_is_refused(train, make_preferences):
    with pytest.raises(DataError, match="no validation completions to measure it on"):
        train(make_preferences(validation=0), max_chosen_fall=2.0)


def test_pairs_of_the_same_completion_are_refused_with_their_number(train, make_preferences):
    faults = [pair(90, rejected="Answer: 90 "), pair(91, rejected="Answer: 91")]
    with pytest.raises(DataError, match=r"2 of 20 pairs have identical completions.*train/90"):
        train(make_preferences(*faults))


def test_held_out_prompts_are_refused_in_training(train, make_preferences, prompts):
    held_out = read_prompts(prompts.path, "test")[0].question
    with pytest.raises(DataError, match="1 training questions occur in the validation or test split"):
        train(make_preferences(pair(90, prompt=question(held_out))), prompts=prompts)


def test_prompts_of_both_splits_are_refused(train, make_preferences):
    with pytest.raises(
        DataError, match=r"1 of 6 validation pairs have a prompt that is in the training split.*validation/20"
    ):
        train(make_preferences(pair(20)))


def test_a_completion_that_is_both_desirable_and_undesirable_is_refused(tmp_path, train):
    examples = [UnpairedExample("1", "train", question("Copy 1."), "Answer: 1", verdict) for verdict in (True, False)]
    write_rows(tmp_path / "examples.arrow", [vars(item) for item in examples], EXAMPLE_SCHEMA)
    with pytest.raises(DataError, match="1 of 1 completions are labelled both desirable and undesirable"):
        train(as_artifact(tmp_path, kind="Preferences"), loss_type="kto")


def test_a_prompt_of_both_splits_is_refused_among_unpaired_examples(tmp_path, train):
    examples = [
        UnpairedExample(split, split, question("Copy 1."), f"Answer: {split}", True)
        for split in ("train", "validation")
    ]
    write_rows(tmp_path / "examples.arrow", [vars(item) for item in examples], EXAMPLE_SCHEMA)
    with pytest.raises(DataError, match="1 of 1 validation completions have a prompt that is in the training split"):
        train(as_artifact(tmp_path, kind="Preferences"), loss_type="kto")


def test_pairs_too_long_for_the_model_and_empty_completions_are_left_out_whole_and_counted(
    tmp_path, train, make_preferences
):
    faults = [pair(90, rejected="word " * 40), pair(91, chosen=" ")]
    workspace = Workspace(tmp_path)
    metrics = train(make_preferences(*faults), workspace=workspace, num_epochs=1)
    assert (metrics["pairs"], metrics["too_long"], metrics["empty_completions"]) == (12, 1, 1)
    lines = [json.loads(line) for line in (workspace.report / "skipped.jsonl").read_text().splitlines()]
    assert lines == [
        {"prompt_id": "train/90", "reason": "too_long"},
        {"prompt_id": "train/91", "reason": "empty_completion"},
    ]


def test_completions_to_a_single_prompt_are_refused_by_kto(tokenizer):
    examples = [UnpairedExample("1", "train", question("Copy 1."), f"Answer: {i}", True) for i in range(3)]
    with pytest.raises(DataError, match="no completion to another prompt fits after prompt 1"):
        answer_rows(tokenizer, examples)


def test_too_few_pairs_for_a_batch_are_refused_with_numbers_and_a_list_of_those_left_out(
    tmp_path, train, make_preferences
):
    with pytest.raises(DataError, match="got 12 pairs, expected at least one batch of 16"):
        train(make_preferences(pair(90, rejected="word " * 40)), workspace=Workspace(tmp_path), batch_size=16)
    assert "train/90" in (Workspace(tmp_path).report / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 3}, r"got 4, expected a multiple of 3: workers x accumulation_steps 3"),
        ({"accumulation_steps": 3}, r"got 4, expected a multiple of 3"),
        ({"loss_type": "kto", "batch_size": 6}, r"got 6, expected a multiple of 4: .* x kl_examples 4"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(train, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "ipo", "label_smoothing": 0.1},
        {"smoothing": "robust"},
        {"loss_type": "simpo", "smoothing": "robust"},
    ],
)
def test_smoothing_that_would_be_ignored_is_refused(changes):
    with pytest.raises(ValueError, match="would be ignored"):
        config_of(**changes)
