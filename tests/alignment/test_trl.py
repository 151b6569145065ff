"""Preference optimisation against TRL 1.16, whose methods used here are private: pyproject.toml pins the version."""

from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from lilpipe.alignment.preference.data import Packer, PreferenceRow, PromptCompletion, with_mismatched
from lilpipe.alignment.preference.evaluation import score_completions
from lilpipe.alignment.preference.losses import sigmoid_loss
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.alignment.rollout.completions import pad_completions
from lilpipe.config.dpo import DPOConfig
from lilpipe.schemas.pairs import UnpairedExample
from tests.alignment.twins import CONFIG, PADDING, our_model, their_model

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

BETA = 0.3

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def settings(tmp_path, **values):
    return {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "bf16": False, **values}


def assert_same_gradients(ours, theirs, *, tolerance=1e-6):
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() < tolerance, name


SIDES = ("first", "second")
PAIRS = [([2, 3], [4, 5, 6, 1], [7, 1]), ([8], [9, 10, 1], [11, 12, 13, 14, 1]), ([15, 16, 17], [18, 1], [19, 20, 1])]
"""Prompt, chosen and rejected answer."""
ONE_TOKEN_PROMPTS = [([prompt[-1]], chosen, rejected) for prompt, chosen, rejected in PAIRS]
KTO_ANSWERS = [
    ([2, 3], [4, 5, 6, 1], True),
    ([8], [9, 10, 1], False),
    ([15, 16, 17], [18, 1], True),
    ([21], [22, 1], False),
]
"""Prompt, answer, and whether it is desirable."""
UNPAIRED_ANSWERS = [*KTO_ANSWERS[:2], ([15, 16, 17], [18, 1], True), ([2, 3], [19, 20, 1], True)]
"""Two answers to the first prompt, and few that are undesirable."""


def pair_rows(pairs):
    return [
        PreferenceRow("", PromptCompletion(p, chosen), PromptCompletion(p, rejected)) for p, chosen, rejected in pairs
    ]


def our_loss(ours, reference, rows, *, packed=True, **options):
    """Our objective on one batch of all rows: the loss, after its backward pass, and its metrics."""
    config = DPOConfig(
        **{"seed": 0, "batch_size": len(rows), "beta": BETA, "rpo_alpha": 0.0, "mask_formatting_tokens": False}
        | options
    )
    packer = Packer(
        padding_id=PADDING, max_len=CONFIG.max_seq_len, packed=packed, mask_formatting=False, device=torch.device("cpu")
    )
    columns = [score_completions(reference, [getattr(row, name) for row in rows], packer, config)[0] for name in SIDES]
    reference_R2 = torch.stack(columns, dim=1) if config.uses_reference else None
    objective = PreferenceObjective(rows, config, packer, reference_R2=reference_R2, rank=0, world_size=1)
    (batch,) = objective.batches(0)
    loss = objective.loss(ours(batch.inputs, targets_BT=batch.targets, documents_BT=batch.documents), batch)
    (loss.total / loss.count).backward()
    metrics = {name: float(total) / count for name, (total, count) in loss.metrics.items()}
    return loss.total.item() / loss.count, metrics


def assert_same(model, loss, trainer, expected):
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert_same_gradients(model, trainer.model, tolerance=1e-5)


# --- losses with a reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "sigmoid"}, {}),
        ({"loss_type": "sigmoid"}, {"packed": False}),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
            {"rpo_alpha": 0.2, "nll_normalisation": "token"},
        ),
        ({"loss_type": "robust", "label_smoothing": 0.1}, {"smoothing": "robust", "label_smoothing": 0.1}),
        ({"loss_type": "sigmoid_norm"}, {"length_normalised": True}),
        ({"loss_type": "ipo"}, {"loss_type": "ipo"}),
    ],
    ids=["sigmoid", "sigmoid, a row each", "sigmoid with likelihood", "robust", "normalised", "ipo"],
)
def test_losses_of_pairs_and_their_gradients_are_trls(tmp_path, word_tokenizer, theirs, ours):
    model, reference = our_model(0), our_model(1)
    trainer = trl.DPOTrainer(
        model=their_model(model),
        ref_model=their_model(reference),
        args=trl.DPOConfig(**settings(tmp_path, beta=BETA, max_length=None, **theirs)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w2", "chosen": "w3", "rejected": "w4"}]),
        processing_class=word_tokenizer,
    )
    trainer.model.eval()
    batch = trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS])
    expected = trainer._compute_loss(trainer.model, batch, False)
    loss, metrics = our_loss(model, reference, pair_rows(PAIRS), **ours)
    assert_same(model, loss, trainer, expected)
    names = {"chosen_logprob": "logps/chosen", "rejected_logprob": "logps/rejected"}
    if theirs["loss_type"] == "sigmoid":
        names |= {
            "reward_chosen": "rewards/chosen",
            "reward_rejected": "rewards/rejected",
            "reward_margin": "rewards/margins",
            "preference_accuracy": "rewards/accuracies",
        }
    logged = {name: trainer._metrics["eval"][other][-1] for name, other in names.items()}
    assert {name: metrics[name] for name in names} == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize(
    ("seeds", "answers", "mismatched"),
    [
        ((0, 1), KTO_ANSWERS, (3, 0, 1, 2)),
        ((1, 0), KTO_ANSWERS, (3, 0, 1, 2)),
        ((0, 1), UNPAIRED_ANSWERS, (2, 0, 1, 2)),
    ],
    ids=["likelier", "unlikelier", "unpaired"],
)
def test_the_kto_loss_and_its_gradient_are_trls(tmp_path, word_tokenizer, seeds, answers, mismatched):
    model, reference = map(our_model, seeds)
    others = [answers[index][1] for index in mismatched]
    data = [{"prompt": f"w{index}", "completion": "w3", "label": index % 2 == 0} for index in range(3, 13)]
    trainer = trl.KTOTrainer(
        model=their_model(model),
        ref_model=their_model(reference),
        args=trl.KTOConfig(
            **settings(tmp_path, beta=BETA, max_length=None, desirable_weight=1.2, undesirable_weight=0.7)
        ),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=word_tokenizer,
    )
    trainer.model.eval()
    batch = trainer.data_collator(
        [
            {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": desirable}
            for (prompt, answer, desirable), other in zip(answers, others, strict=True)
        ]
    )
    expected = trainer._compute_loss(trainer.model, batch, False)
    examples = [
        (UnpairedExample("", "train", [], "", desirable), PromptCompletion(prompt, answer))
        for prompt, answer, desirable in answers
    ]
    rows = with_mismatched(examples, max_len=CONFIG.max_seq_len)
    options = {"loss_type": "kto", "kl_examples": 4, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    loss, metrics = our_loss(model, reference, rows, **options)
    assert_same(model, loss, trainer, expected)
    names = {"kl": "kl", "reward_chosen": "rewards/chosen", "rejected_logprob": "logps/rejected"}
    logged = {name: trainer._metrics["eval"][other][-1] for name, other in names.items()}
    assert {name: metrics[name] for name in names} == pytest.approx(logged, rel=1e-5, abs=1e-5)


# --- losses without a reference -----------------------------------------------------------------------------------


def unreferenced_batch(pairs):
    """What the collators of TRL's older trainers make."""
    batch = {}
    for side, index in (("chosen", 1), ("rejected", 2)):
        tokens, mask = pad_completions([p[0] for p in pairs], [p[index] for p in pairs], padding_id=PADDING)
        lengths = torch.tensor([[len(p[0]) + len(p[index])] for p in pairs])
        is_answer = torch.cat([torch.zeros(len(pairs), 1, dtype=torch.bool), mask], dim=1)
        batch[f"{side}_input_ids"] = tokens
        batch[f"{side}_attention_mask"] = (torch.arange(tokens.shape[1]) < lengths).long()
        batch[f"{side}_labels"] = tokens.where(is_answer, -100)
    return batch


def unreferenced_trainer(kind, tmp_path, word_tokenizer, model, **options):
    from trl.experimental import cpo, orpo

    classes = {"simpo": (cpo.CPOTrainer, cpo.CPOConfig), "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig)}
    trainer_class, config_class = classes[kind]
    trainer = trainer_class(
        model=their_model(model),
        args=config_class(**settings(tmp_path, beta=BETA, max_length=32, **options)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w2", "chosen": "w3", "rejected": "w4"}]),
        processing_class=word_tokenizer,
    )
    trainer.model.eval()
    return trainer


@pytest.mark.parametrize(("label_smoothing", "nll"), [(0.0, 0.0), (0.1, 0.5)])
def test_the_simpo_loss_and_its_gradient_are_trls(tmp_path, word_tokenizer, label_smoothing, nll):
    model = our_model(0)
    theirs = {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": nll, "label_smoothing": label_smoothing}
    trainer = unreferenced_trainer("simpo", tmp_path, word_tokenizer, model, **theirs)
    expected, _ = trainer.get_batch_loss_metrics(trainer.model, unreferenced_batch(PAIRS))
    ours = {"loss_type": "simpo", "gamma": 0.7, "label_smoothing": label_smoothing, "rpo_alpha": nll}
    loss, _ = our_loss(model, model, pair_rows(PAIRS), nll_normalisation="token", **ours)
    assert_same(model, loss, trainer, expected)


def test_the_orpo_loss_and_its_gradient_are_trls(tmp_path, word_tokenizer):
    # TRL's likelihood term covers the prompt too, ours the answer alone: with prompts of one token they are the same.
    model = our_model(0)
    trainer = unreferenced_trainer("orpo", tmp_path, word_tokenizer, model)
    expected, _ = trainer.get_batch_loss_metrics(trainer.model, unreferenced_batch(ONE_TOKEN_PROMPTS))
    rows = pair_rows(ONE_TOKEN_PROMPTS)
    loss, _ = our_loss(model, model, rows, loss_type="orpo", rpo_alpha=1.0, nll_normalisation="token")
    assert_same(model, loss, trainer, expected)


def test_the_odds_ratio_behind_longer_prompts_and_its_gradient_are_trls(tmp_path, word_tokenizer):
    model = our_model(0)
    trainer = unreferenced_trainer("orpo", tmp_path, word_tokenizer, model)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, unreferenced_batch(PAIRS))
    expected = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    loss, _ = our_loss(model, model, pair_rows(PAIRS), loss_type="orpo")
    assert_same(model, loss, trainer, expected)


def test_conservative_smoothing_is_that_of_trls_loss_of_pairs():
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0, loss_type="sigmoid", beta=BETA, label_smoothing=0.1, accelerator=SimpleNamespace(device="cpu")
    )
    chosen, rejected = torch.tensor([-1.0, 3.0]), torch.tensor([0.5, -2.0])
    cpo_loss: Any = CPOTrainer.cpo_loss
    expected, *_ = cpo_loss(trainer, chosen, rejected)
    assert torch.allclose(sigmoid_loss(chosen - rejected, beta=BETA, label_smoothing=0.1), expected, atol=1e-7)
