"""Sections of the corpus report on evaluation set matches and on the quality classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lilpipe.config.corpus import DecontaminationConfig
from lilpipe.data.filters.decontamination import MATCHES, EvaluationIndex
from lilpipe.page import Fragment, heading, note, table, text_block
from lilpipe.schemas.tables import read_table

MATCHES_FILE = "evaluation_matches.arrow"
NUM_EXAMPLES = 10


def evaluation_section(index: EvaluationIndex, matches: pa.Table, config: DecontaminationConfig) -> list[Fragment]:
    """Return the coverage of the evaluation sets, the number of matches, and the strongest and weakest matches."""
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
                "too short to match": coverage["too_short"],
                "items found": len({items[number] for number in mine}),
                "in documents": len({documents[number] for number in mine}),
            }
        )
    said = "rejected" if config.action == "reject" else "kept (corpus.decontamination.action = `report`)"
    fragments = [
        note(
            f"Items that share {config.ngram_size} consecutive words with a document (shorter items: all their words, "
            f"at least {config.min_item_words}); the documents were {said}. All matches: {MATCHES_FILE}."
        ),
        table(rows),
    ]
    if matches.num_rows:
        order = np.argsort(-matches["item_ratio"].to_numpy(), kind="stable")
        first, last = order[:NUM_EXAMPLES], order[max(NUM_EXAMPLES, len(order) - NUM_EXAMPLES) :]
        fragments += [heading("Strongest matches"), *_examples(matches, first)]
        if len(last):
            fragments += [heading("Weakest matches, most likely by chance"), *_examples(matches, last)]
    return fragments


def classifier_section(report: Mapping[str, Any], min_score: float) -> list[Fragment]:
    """Return the classifier's quality on held-out examples; ``report`` is a ``ClassifierReport``."""
    rows = [
        {
            "minimum score": row["min_score"],
            "precision": None if row["precision"] is None else f"{row['precision']:.1%}",
            "recall": f"{row['recall']:.1%}",
            "F1": f"{row['f1']:.1%}",
        }
        for row in report["at_thresholds"]
    ]
    return [
        note(
            f"Trained on {report['num_trained']:,} examples of each class, measured on {report['num_validation']:,} "
            f"held-out examples of each class. The sources have {report['num_good']:,} good and {report['num_bad']:,} "
            f"bad examples; {report['num_in_both']:,} in both classes were left out. Area under the ROC curve: "
            f"{report['auc']:.4f}. Documents with a score below {min_score:.4g} were rejected."
        ),
        table(rows),
    ]


def _examples(matches: pa.Table, rows: np.ndarray) -> list[Fragment]:
    return [
        text_block(
            f"{row['before']}⟦{row['overlap']}⟧{row['after']}",
            title=row["document"],
            detail=f"{row['set']}/{row['item']} · {row['item_ratio']:.0%} of the item's n-grams",
        )
        for row in matches.take(pa.array(rows)).to_pylist()
    ]


def gather_matches(folder: Path) -> pa.Table:
    """Return the matches of all filtering tasks, in corpus order."""
    return pa.concat_tables([MATCHES.empty_table(), *(read_table(path) for path in sorted(folder.glob("*.arrow")))])
