import pytest

from lilpipe.training.schedule import lr_scale


@pytest.mark.parametrize(
    ("shape", "min_ratio", "expected"),
    [
        # 3 steps of warmup to 1 at step 3, then 8 steps; cos(pi/4) = 0.70711.
        ("cosine", 0.0, [0.25, 0.5, 0.75, 1.0, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806]),
        ("linear", 0.0, [0.25, 0.5, 0.75, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", 0.2, [0.25, 0.5, 0.75, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("constant", 0.0, [0.25, 0.5, 0.75, *[1.0] * 8]),
    ],
)
def test_the_learning_rate_follows_the_values_worked_out_by_hand(shape, min_ratio, expected):
    got = [lr_scale(s, num_steps=11, warmup_steps=3, shape=shape, min_ratio=min_ratio) for s in range(11)]
    assert got == pytest.approx(expected, abs=1e-5)


def test_without_warmup_the_first_step_is_at_the_peak():
    assert lr_scale(0, num_steps=5, warmup_steps=0, shape="cosine", min_ratio=0.1) == 1.0


def test_a_run_shorter_than_its_warmup_never_reaches_the_peak():
    got = [lr_scale(s, num_steps=3, warmup_steps=9, shape="linear", min_ratio=0.0) for s in range(3)]
    assert got == pytest.approx([0.1, 0.2, 0.3])


def test_warmup_stable_decay_stays_at_the_peak_and_falls_over_the_share_at_the_end():
    # Of 20 steps the last 5: 1 - sqrt(0), 1 - sqrt(1/5), ... of the way from 1 to 0.1.
    got = [lr_scale(s, num_steps=20, warmup_steps=3, shape="wsd", min_ratio=0.1, decay_ratio=0.25) for s in range(20)]
    fall = [1.0, 0.59751, 0.43079, 0.30286, 0.19501]
    assert got == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 12, *fall], abs=1e-5)


def test_up_to_its_fall_a_run_of_warmup_stable_decay_does_not_depend_on_its_length():
    short, long = (
        [lr_scale(s, num_steps=n, warmup_steps=5, shape="wsd", min_ratio=0.0, decay_ratio=0.2) for s in range(80)]
        for n in (100, 1000)
    )
    assert short == long


@pytest.mark.parametrize("decay_ratio", [0.0, 0.9, 1.0])
def test_of_warmup_stable_decay_any_share_rises_once_and_never_above_the_peak(decay_ratio):
    options = {"num_steps": 10, "warmup_steps": 4, "min_ratio": 0.0, "decay_ratio": decay_ratio}
    got = [lr_scale(s, shape="wsd", **options) for s in range(10)]
    assert got[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert got[4:] == sorted(got[4:], reverse=True)
    assert min(got) > 0
