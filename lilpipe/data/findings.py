"""Sections of the corpus report: what was found of evaluation sets, and how good the quality classifier is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lilpipe.config.corpus import DecontaminationConfig
from lilpipe.data.filters.decontamination import MATCHES, EvaluationIndex
from lilpipe.report import heading, note, table, text_block
from lilpipe.schemas.tables import read_table

MATCHES_FILE = "evaluation_matches.arrow"
NUM_EXAMPLES = 10


def evaluation_section(index: EvaluationIndex, matches: pa.Table, config: DecontaminationConfig) -> list[str]:
    """What was looked for, what was found, and the matches to judge by: the fullest and the thinnest ones."""
    documents, items = (
        matches["document"].to_pylist(),
        list(zip(matches["set"].to_pylist(), matches["item"].to_pylist(), strict=True)),
    )
    rows = []
    for name, coverage in index.coverage().items():
        mine = [number for number, (each, _) in enumerate(items) if each == name]
        rows.append(
            {
                "evaluation set": name,
                "items": coverage["items"],
                "too short to look for": coverage["too_short"],
                "items found": len({items[number] for number in mine}),
                "in documents": len({documents[number] for number in mine}),
            }
        )
    said = "rejected" if config.action == "reject" else "kept, as corpus.decontamination.action says `report`"
    fragments = [
        note(
            f"Items that share {config.ngram_size} words in a row with a document (shorter items: all their words, at "
            f"least {config.min_item_words}); the documents were {said}. All matches: {MATCHES_FILE}."
        ),
        table(rows),
    ]
    if matches.num_rows:
        order = np.argsort(-matches["item_ratio"].to_numpy(), kind="stable")
        first, last = order[:NUM_EXAMPLES], order[max(NUM_EXAMPLES, len(order) - NUM_EXAMPLES) :]
        fragments += [heading("The fullest matches"), *_examples(matches, first)]
        if len(last):
            fragments += [heading("The thinnest matches, where chance is likeliest"), *_examples(matches, last)]
    return fragments


def classifier_section(report: Mapping[str, Any], min_score: float) -> list[str]:
    """How good the classifier is on examples that it was not trained on; ``report`` is a ``ClassifierReport``."""
    rows = [
        {
            "least score": row["min_score"],
            "precision": None if row["precision"] is None else f"{row['precision']:.1%}",
            "recall": f"{row['recall']:.1%}",
            "F1": f"{row['f1']:.1%}",
        }
        for row in report["at_thresholds"]
    ]
    return [
        note(
            f"Trained on {report['num_trained']:,} good and as many bad examples, measured on "
            f"{report['num_validation']:,} of each that were held out; of {report['num_good']:,} and "
            f"{report['num_bad']:,} that were given, and {report['num_in_both']:,} given as both and left out. "
            f"Area under the ROC curve: {report['auc']:.4f}. Documents below {min_score:.4g} were rejected."
        ),
        table(rows),
    ]


def _examples(matches: pa.Table, rows: np.ndarray) -> list[str]:
    return [
        text_block(
            f"{row['before']}⟦{row['overlap']}⟧{row['after']}",
            title=row["document"],
            detail=f"{row['set']}/{row['item']} · {row['item_ratio']:.0%} of the item's n-grams",
        )
        for row in matches.take(pa.array(rows)).to_pylist()
    ]


def gather_matches(folder: Path) -> pa.Table:
    """The matches that all filtering tasks found, in the corpus's order."""
    return pa.concat_tables([MATCHES.empty_table(), *(read_table(path) for path in sorted(folder.glob("*.arrow")))])
