"""Rows of completions, as evaluation makes them."""


def completion(prompt, *, greedy, correct=False, words=1, well_formed=True, family="sort", sample=0):
    return {
        "prompt_id": prompt,
        "family": family,
        "greedy": greedy,
        "sample": sample,
        "correct": correct,
        "well_formed": well_formed,
        "num_words": words,
        "verifiable": True,
        "rewards": {"answer": float(correct)},
    }


def games(words):
    """Sampled completions to prompts a, b, ... with these numbers of words; None is malformed."""
    return [
        completion(f"{prompt}", greedy=False, words=count or 0, well_formed=count is not None, sample=sample)
        for prompt, counts in enumerate(words)
        for sample, count in enumerate(counts)
    ]
