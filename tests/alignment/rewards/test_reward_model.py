import math

import pytest
import torch

from lilpipe.alignment.rewards.calibration import calibration, preference_sections
from lilpipe.alignment.rewards.reward_model import (
    EncodedRanking,
    bradley_terry_loss,
    collate,
    length_baseline,
    load_reward_model,
    pairs_of_rankings,
    ranking_loss,
    run,
)
from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel import ParallelConfig
from lilpipe.config.reward_model import RewardModelConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.errors import ArtifactError, DataError
from lilpipe.model import heads
from lilpipe.model.heads import save_head_model, with_head
from lilpipe.model.hub import load_model
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import read_prompts
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import PAIR_SCHEMA, Pair
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render
from tests.alignment.conftest import as_artifact, digest_of

CONFIG = RewardModelConfig(
    seed=0,
    batch_size=4,
    num_epochs=3,
    checkpoint_every=2,
    log_every=1,
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
)
PADDING = 0


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("lilpipe.alignment.rewards.reward_model.write_report", lambda *args, **options: None)
    monkeypatch.setattr("lilpipe.alignment.rewards.reward_model.preference_sections", lambda margins: {})


def pair(index, split="train", **answers):
    prompt: list[Message] = [{"role": "user", "content": f"Copy {index}."}]
    given = {"chosen": f"Answer: {index}", "rejected": f"Sure, I can. Answer: {index}", **answers}
    return Pair(f"{split}/{index}", split, prompt, **given)


@pytest.fixture
def preferences(tmp_path):
    def make(*pairs, kind="Preferences"):
        directory = tmp_path / "pairs"
        write_rows(directory / "pairs.arrow", [vars(item) for item in pairs], PAIR_SCHEMA)
        return as_artifact(directory, kind=kind)

    return make


@pytest.fixture
def plain(preferences):
    return preferences(*(pair(i) for i in range(12)), *(pair(i, "validation") for i in range(20, 26)))


# --- mathematics --------------------------------------------------------------------------------------------------


def test_the_loss_is_minus_the_log_probability_that_the_chosen_answer_wins():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(1))]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected)
    with_margin = bradley_terry_loss(chosen, rejected, margin_P=0.5, centering=0.01).tolist()
    assert with_margin == pytest.approx([math.log1p(math.exp(-1.5)) + 0.04, math.log1p(math.exp(1.5)) + 0.01])


def test_a_ranking_gives_all_its_pairs_and_weighs_once():
    pairs = pairs_of_rankings([2, 3])
    assert list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == [(0, 1), (2, 3), (2, 4), (3, 4)]
    assert pairs.apart_P.tolist() == [1, 1, 2, 1]
    assert pairs.weight_P.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


SIZE = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=32)


def small_model(seed=0):
    model = Transformer(SIZE, 32)
    model.init_weights(seed)
    for parameter in model.parameters():
        parameter.data.mul_(8) if parameter.dim() > 1 else None
    model = with_head(model, 1, seed=0)
    model.score.weight.data.mul_(20)
    return model


def loss_of(model, rankings, config):
    batch = collate(rankings, padding_id=PADDING)
    return ranking_loss(model(batch.inputs), batch, config)


def test_the_loss_of_rankings_is_that_of_their_pairs_one_by_one():
    rankings = [EncodedRanking("a", [[5, 6, 7], [8, 9], [10]]), EncodedRanking("b", [[11, 12], [13, 14, 15, 16]])]
    config = CONFIG.model_copy(update={"margin": 0.3, "center_rewards_coefficient": 0.02})
    model = small_model()
    got = loss_of(model, rankings, config)
    with torch.no_grad():
        a, b, c, d, e = (model(torch.tensor([ids]))[0, -1, 0].item() for item in rankings for ids in item.answers)

    def loss(better, worse, margin):
        return math.log1p(math.exp(margin - better + worse)) + 0.02 * (better + worse) ** 2

    expected = (loss(a, b, 0.3) + loss(a, c, 0.6) + loss(b, c, 0.3)) / 3 + loss(d, e, 0.3)
    assert got.total.item() == pytest.approx(expected, rel=1e-5)
    assert got.count == 2
    assert got.num_tokens == 12


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.7, 0.01)])
def test_the_loss_and_its_gradient_are_trls(tmp_path, margin, centering):
    trl, transformers, datasets = (pytest.importorskip(name) for name in ("trl", "transformers", "datasets"))
    rankings = [EncodedRanking("a", [[5, 6, 7, 8], [9, 10]]), EncodedRanking("b", [[11], [12, 13, 14, 15, 16]])]
    ours = small_model()
    theirs = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=SIZE.hidden_size,
            num_hidden_layers=SIZE.num_layers,
            num_attention_heads=SIZE.num_heads,
            num_key_value_heads=SIZE.num_kv_heads,
            intermediate_size=SIZE.intermediate_size,
            max_position_embeddings=SIZE.max_seq_len,
            rms_norm_eps=SIZE.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": SIZE.rope_theta},
            pad_token_id=PADDING,
            num_labels=1,
        )
    )
    theirs.load_state_dict(ours.state_dict())
    trainer = trl.RewardTrainer(
        model=theirs,
        args=trl.RewardConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            bf16=False,
            center_rewards_coefficient=centering or None,
        ),
        train_dataset=datasets.Dataset.from_list([{"chosen_ids": [3], "rejected_ids": [4]}]),
        processing_class=word_tokenizer(transformers),
    )
    trainer.model.eval()
    examples = [{"chosen_ids": r.answers[0], "rejected_ids": r.answers[1], "margin": margin} for r in rankings]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    expected.backward()

    config = CONFIG.model_copy(update={"margin": margin, "center_rewards_coefficient": centering})
    loss = loss_of(ours, rankings, config)
    (loss.total / loss.count).backward()
    assert loss.total.item() / loss.count == pytest.approx(expected.item(), abs=1e-5)
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name].grad).abs().max() < 1e-5, name


def word_tokenizer(transformers):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, 32)}}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


# --- calibration --------------------------------------------------------------------------------------------------


def test_a_model_that_says_what_comes_true_is_calibrated_and_one_that_boasts_is_not():
    margin = math.log(0.68 / 0.32)  # states 68 %
    honest = calibration([margin] * 17 + [-margin] * 8)
    assert honest.error == pytest.approx(0, abs=1e-12)
    assert honest.brier == pytest.approx(0.68 * 0.32**2 + 0.32 * 0.68**2)
    boasting = calibration([margin] * 5 + [-margin] * 5)
    assert boasting.error == pytest.approx(0.18)
    (filled,) = [item for item in boasting.bins if item.count]
    assert (filled.low, filled.high) == pytest.approx((0.65, 0.7))
    assert (filled.count, filled.share, filled.confidence) == (10, 0.5, pytest.approx(0.68))


def test_a_model_that_knows_nothing_has_a_brier_score_of_a_quarter():
    found = calibration([0.0, 0.0])
    assert (found.brier, found.error) == (0.25, 0.0)


def test_pairs_that_are_sure_and_right_lie_in_the_last_bin():
    found = calibration([1000.0, -1000.0, 50.0])
    assert [item.count for item in found.bins] == [0] * 9 + [3]


def test_the_report_shows_the_table_and_both_pictures():
    sections = preference_sections([0.3, -0.2, 1.5, 0.0])
    calibrated, margins = map("".join, sections.values())
    assert "Brier score" in calibrated
    assert calibrated.count("<svg") == margins.count("<svg") == 1
    assert preference_sections([]) == {}


def test_what_length_alone_would_say_is_worked_out_by_hand():
    def ranking(*lengths):
        return EncodedRanking("p", [[1] * length for length in lengths])

    shorter = length_baseline([ranking(3, 5), ranking(2, 9), ranking(7, 4)])
    assert shorter == {"validation_length_accuracy": pytest.approx(2 / 3)}
    longer = length_baseline([ranking(5, 3), ranking(6, 4, 5), ranking(2, 2)])
    assert longer == {"validation_length_accuracy": pytest.approx((1 + 2 / 3 + 1 / 2) / 3)}
    assert length_baseline([]) == {}


# --- scoring ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(make_checkpoint, tmp_path_factory):
    language_model, tokenizer = load_model(make_checkpoint().path)
    model = with_head(language_model, 1, seed=3)
    directory = tmp_path_factory.mktemp("rewards")
    save_head_model(model, tokenizer, directory, labels=["reward"])
    return load_reward_model(directory, torch.device("cpu"))


def conversation(question, answer) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_score_is_the_heads_output_at_the_end_of_the_turn_whatever_shares_the_batch(scorer, monkeypatch):
    conversations = [conversation("Q" * (1 + i % 5), "A" * (i % 7)) for i in range(9)]
    monkeypatch.setattr(heads, "TOKENS_AT_ONCE", 40)
    got = scorer.score(conversations)
    for item, score in zip(conversations, got, strict=True):
        ids, _ = render(scorer.tokenizer, item)
        with torch.no_grad():
            expected = scorer.model(torch.tensor([ids]))[0, -1, 0].item()
        assert ids[-1] == scorer.tokenizer.turn_end_id
        assert score == pytest.approx(expected, abs=1e-5)
    assert scorer.score([]) == []


def test_transformers_gives_the_same_scores_from_the_same_directory(tmp_path, scorer):
    transformers = pytest.importorskip("transformers")
    save_head_model(scorer.model, scorer.tokenizer, tmp_path, labels=["reward"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    conversations = [conversation("What is 2 + 2?", "Answer: 4"), conversation("Hi", "")]
    texts = [tokenizer.apply_chat_template(item, tokenize=False) for item in conversations]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
    assert scorer.score(conversations) == pytest.approx(expected, abs=1e-5)
    assert scorer.score(conversations)[0] != pytest.approx(scorer.score(conversations)[1], abs=1e-3)


def test_batches_hold_no_more_tokens_than_said(scorer, monkeypatch):
    monkeypatch.setattr(heads, "TOKENS_AT_ONCE", 40)
    sizes = []
    forward = type(scorer.model).forward

    def spying(self, tokens_BT, **options):
        sizes.append(tokens_BT.numel())
        return forward(self, tokens_BT, **options)

    monkeypatch.setattr(type(scorer.model), "forward", spying)
    scorer.score([conversation("Q", "A" * (i % 7)) for i in range(9)])
    assert len(sizes) > 1
    assert max(sizes) <= 40


def test_a_conversation_that_is_too_long_loses_its_beginning_and_an_answer_that_is_too_long_is_refused(scorer):
    conversation_ = conversation("Q" * 100, "A" * 80)
    ids, _ = render(scorer.tokenizer, conversation_)
    assert len(ids) == 184
    with torch.no_grad():
        expected = scorer.model(torch.tensor([ids[-160:]]))[0, -1, 0].item()
    assert scorer.score([conversation_]) == pytest.approx([expected], abs=1e-5)
    with pytest.raises(DataError, match="got a completion of 200 tokens, expected at most its 160"):
        scorer.score([conversation("Q", "A" * 199)])


def test_a_classifier_is_no_reward_model(tmp_path, make_checkpoint):
    language_model, tokenizer = load_model(make_checkpoint().path)
    save_head_model(with_head(language_model, 2, seed=0), tokenizer, tmp_path)
    with pytest.raises(ArtifactError, match="its head has 2 outputs, expected 1"):
        load_reward_model(tmp_path, torch.device("cpu"))


# --- the stage ----------------------------------------------------------------------------------------------------


def test_a_preference_is_learnt_and_found_again_in_prompts_held_out(tmp_path, make_checkpoint, plain):
    config = CONFIG.model_copy(update={"num_epochs": 6})
    metrics = run(config, {"model": make_checkpoint(), "preferences": plain}, Workspace(tmp_path))
    assert metrics["steps"] == 18
    assert metrics["validation_accuracy"] == 1
    assert metrics["validation_accuracy_stderr"] == 0
    assert metrics["validation_margin"] > 0.1
    assert metrics["validation_length_accuracy"] == 1  # the preference of these pairs is for brevity
    assert metrics["validation_brier"] < 0.25
    scorer = load_reward_model(tmp_path / "output", torch.device("cpu"))
    short, long = scorer.score([conversation("Copy 99.", f"{start}Answer: 99") for start in ("", "Sure, I can. ")])
    assert short > long


def test_an_edited_answer_stands_above_the_chosen_one(tmp_path, make_checkpoint, preferences):
    rankings = [pair(i, edited=f"<{i}>") for i in range(12)] + [
        pair(i, "validation", edited=f"<{i}>") for i in (20, 21)
    ]
    config = CONFIG.model_copy(update={"num_epochs": 10})
    metrics = run(config, {"model": make_checkpoint(), "preferences": preferences(*rankings)}, Workspace(tmp_path))
    assert metrics["validation_accuracy"] == 1
    scorer = load_reward_model(tmp_path / "output", torch.device("cpu"))
    edited, chosen = scorer.score([conversation("Copy 9.", "<9>"), conversation("Copy 9.", "Answer: 9")])
    assert edited > chosen


def test_pairs_of_a_prompts_artifact_do_as_well(tmp_path, make_checkpoint, plain, prompts):
    (plain.path / "prompts.arrow").write_bytes((prompts.path / "prompts.arrow").read_bytes())
    inputs = {"model": make_checkpoint(), "prompts": plain}
    assert run(CONFIG, inputs, Workspace(tmp_path / "alone"))["rankings"] == 12
    both = run(CONFIG, {**inputs, "preferences": plain}, Workspace(tmp_path / "both"))
    assert both["rankings"] == 12  # not twice the same


def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path, make_checkpoint, plain, monkeypatch):
    inputs = {"model": make_checkpoint(), "preferences": plain}
    run(CONFIG, inputs, Workspace(tmp_path / "whole"))
    killed = Workspace(tmp_path / "killed")
    progress = killed.progress

    def dying(done, total, unit="steps", **metrics):
        if unit == "steps" and done == 5:  # the last checkpoint is that of step 4
            raise KeyboardInterrupt
        progress(done, total, unit, **metrics)

    monkeypatch.setattr(killed, "progress", dying)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, inputs, killed)
    run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))


# --- gates --------------------------------------------------------------------------------------------------------


def refused(make_checkpoint, tmp_path, match, config=CONFIG, **inputs):
    with pytest.raises(DataError, match=match):
        run(config, {"model": make_checkpoint(), **inputs}, Workspace(tmp_path / "refused"))


def test_an_answer_preferred_to_itself_is_refused_with_the_number_of_such(tmp_path, make_checkpoint, preferences):
    planted = preferences(*(pair(i) for i in range(9)), pair(9, chosen="same", rejected="same "))
    match = "1 of 10 pairs have identical completions, expected none; the first is train/9"
    refused(make_checkpoint, tmp_path, match, preferences=planted)


def test_an_edit_that_changed_nothing_is_refused(tmp_path, make_checkpoint, preferences):
    planted = preferences(*(pair(i) for i in range(9)), pair(9, edited="Answer: 9"))
    refused(make_checkpoint, tmp_path, "1 of 10 pairs have identical completions", preferences=planted)


def test_a_held_out_prompt_among_those_learnt_is_refused(tmp_path, make_checkpoint, preferences):
    planted = preferences(*(pair(i) for i in range(9)), pair(3, "validation"), pair(20, "validation"))
    refused(
        make_checkpoint,
        tmp_path,
        "1 of 2 validation pairs have a prompt that is in the training split",
        preferences=planted,
    )


def test_no_pairs_are_refused(tmp_path, make_checkpoint, prompts):
    refused(make_checkpoint, tmp_path, "got no pairs, expected at least one batch", prompts=prompts)


def test_fewer_rankings_than_a_batch_are_refused_with_numbers(tmp_path, make_checkpoint, plain):
    config = CONFIG.model_copy(update={"batch_size": 16})
    match = "got 12 rankings, expected at least one batch of 16"
    refused(make_checkpoint, tmp_path, match, config=config, preferences=plain)


def test_a_batch_that_workers_and_micro_batches_cannot_share_is_refused():
    match = "batch_size 4 must be a multiple of replicate x shard x accumulation_steps = 1 x 2 x 4 = 8"
    with pytest.raises(ValueError, match=match):
        RewardModelConfig(batch_size=4, num_workers=2, accumulation_steps=4, parallel=ParallelConfig(shard=2))


def test_rankings_that_are_too_long_are_left_out_whole_and_counted(tmp_path, make_checkpoint, preferences):
    planted = preferences(*(pair(i) for i in range(9)), pair(9, rejected="long " * 50))
    workspace = Workspace(tmp_path)
    metrics = run(CONFIG, {"model": make_checkpoint(), "preferences": planted}, workspace)
    assert metrics["rankings"] == 9
    assert "skipped 1 of 10 rankings with a conversation of more than 160 tokens" in workspace.events.read_text()
    assert "validation_accuracy" not in metrics


def test_held_out_questions_in_the_pairs_are_refused(tmp_path, make_checkpoint, preferences, prompts):
    question = read_prompts(prompts.path, "test")[0].question
    planted = Pair("x", "train", [{"role": "user", "content": question}], "a", "b")
    match = "1 training questions occur in the validation or test split"
    pairs = preferences(*(pair(i) for i in range(9)), planted)
    refused(make_checkpoint, tmp_path, match, preferences=pairs, prompts=prompts)
