"""Language identification beside fastText on the whole text, with the same model, in the same run.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.language [FOLDER]

FOLDER holds the shared data (`../shared/data`). Rounds alternate, so that both meet the same load of the machine; time
is the processor's. The peer is fastText's bare binding as ``fasttext_model`` calls it, which is what
datatrove's `FT176LID` does with the same text; that class itself fetches its own model from the network.

Half of the documents, by a hash of the id, served to choose the pieces and what is left out; the numbers are of the
other half, speed excepted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from lilpipe.data.filters.fasttext_model import best_label, codes, load
from lilpipe.data.filters.language import FIELD, bundled_model_path, identify

ENGLISH = ("python-peps", "rust-rfcs", "rust-book")
ROUNDS = 5
MIN_SCORE = 0.65
SAME_LANGUAGE = {"nb": "no"}
"""ISO 639-3: Bokmål (nob) is a member of Norwegian (nor), and the model has one label for them."""

Identify = Callable[[str], tuple[str, float]]


def whole_text(text: str) -> tuple[str, float]:
    """What fastText says of the whole text."""
    return best_label(load(bundled_model_path(), FIELD), text)


def read(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Texts by id."""
    found = {}
    for name in names:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            found |= {row["id"]: row["text"] for row in map(json.loads, file)}
    return found


def held_out(texts: dict[str, str]) -> dict[str, str]:
    """The half that chose nothing."""
    return {key: text for key, text in texts.items() if int(hashlib.sha1(key.encode()).hexdigest(), 16) % 2}


def measure_speed(title: str, texts: list[str]) -> None:
    """Print the speeds of both and their ratio."""
    methods: dict[str, Identify] = {"fastText, whole text": whole_text, "lilpipe": identify}
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    num_bytes = sum(len(text.encode()) for text in texts)
    for _ in range(ROUNDS):
        for name, method in methods.items():
            start = time.process_time()
            for text in texts:
                method(text)
            speeds[name].append(num_bytes / 1e6 / (time.process_time() - start))
    print(f"{title}: {len(texts)} documents, {num_bytes / 1e6:.1f} MB")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"  {name:22} median {median:6.1f} MB/s, from {min(values):.1f} to {max(values):.1f}")
    ratios = [ours / theirs for theirs, ours in zip(*speeds.values(), strict=True)]
    print(f"  ratio of a round: median {statistics.median(ratios):.1f}, from {min(ratios):.1f} to {max(ratios):.1f}")


def measure_agreement(title: str, texts: dict[str, str]) -> None:
    """Print how often both give the same label, and the same decision at the default threshold."""
    pairs = {key: (whole_text(text), identify(text)) for key, text in texts.items()}
    same_label = sum(theirs[0] == ours[0] for theirs, ours in pairs.values())
    same_side = sum((theirs[1] >= MIN_SCORE) == (ours[1] >= MIN_SCORE) for theirs, ours in pairs.values())
    print(f"{title}: same label {same_label / len(pairs):.4f}, same side of {MIN_SCORE} {same_side / len(pairs):.4f}")
    for key, (theirs, ours) in [item for item in pairs.items() if item[1][0][0] != item[1][1][0]][:5]:
        print(f"  {key}: fastText {theirs[0]} {theirs[1]:.2f}, lilpipe {ours[0]} {ours[1]:.2f}")


def tldr_language(key: str) -> str:
    """The language of a page as its id says: `tldr/pages.pt_BR/...` is pt, `tldr/pages/...` en."""
    folder = key.split("/")[1]
    return folder.partition(".")[2].partition("_")[0] or "en"


def measure_accuracy(texts: dict[str, str]) -> None:
    """Print the share of tldr pages of which both tell the language, overall and where it is below 99 %."""
    known = codes(load(bundled_model_path(), FIELD))
    pages = defaultdict(list)
    for key, text in texts.items():
        pages[tldr_language(key)].append(text)
    unknown = [code for code in pages if SAME_LANGUAGE.get(code, code) not in known]
    print(f"tldr: {len(texts)} pages, {len(pages)} languages; unknown to the model: {unknown or 'none'}")
    for name, method in (("fastText, whole text", whole_text), ("lilpipe", identify)):
        found = {code: [method(text) for text in pages[code]] for code in sorted(pages)}
        right = {code: [SAME_LANGUAGE.get(code, code) == got for got, _ in found[code]] for code in found}
        strictly = sum(code == got for code in found for got, _ in found[code]) / len(texts)
        accuracy = sum(map(sum, right.values())) / len(texts)
        by_language = statistics.mean(sum(each) / len(each) for each in right.values())
        sure = sum(ok and s >= MIN_SCORE for code in found for ok, (_, s) in zip(right[code], found[code], strict=True))
        print(f"  {name}: accuracy {accuracy:.4f} (nb other than no: {strictly:.4f}), mean of languages")
        print(f"    {by_language:.4f}, right and at least {MIN_SCORE} sure {sure / len(texts):.4f}")
        for code, each in right.items():
            if sum(each) < 0.99 * len(each):
                most = Counter(got for got, _ in found[code]).most_common(3)
                print(f"    {code}: {sum(each)} of {len(each)}; taken for {most}")


def main() -> None:
    """Measure all."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    english, tldr = read(folder, ENGLISH), read(folder, ("tldr",))
    measure_speed("English documents", list(english.values())[::4])
    measure_speed("tldr", list(tldr.values())[::8])
    measure_agreement("English documents, held-out half", held_out(english))
    measure_agreement("English documents, all", english)
    measure_agreement("tldr, held-out half", held_out(tldr))
    measure_accuracy(held_out(tldr))


if __name__ == "__main__":
    main()
