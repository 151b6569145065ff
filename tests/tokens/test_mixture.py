import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilpipe.config.phases import MixtureConfig
from lilpipe.errors import ConfigError
from lilpipe.tokens.mixture import largest_total, mixture, resolve

LLAMA_3 = {"general": 50.0, "mathematics": 25.0, "code": 17.0, "multilingual": 8.0}


def reached(parts):
    return {name: part.reached for name, part in parts.items()}


def test_weights_are_kept_where_every_stream_holds_enough():
    tokens = dict.fromkeys(LLAMA_3, 1000)
    parts = mixture(LLAMA_3, tokens, total_tokens=2000, max_epochs=dict.fromkeys(LLAMA_3, 1.0))
    assert reached(parts) == pytest.approx({"general": 0.5, "mathematics": 0.25, "code": 0.17, "multilingual": 0.08})
    assert parts["general"].epochs == pytest.approx(1.0)
    assert parts["code"].epochs == pytest.approx(0.34)
    assert {part.reason for part in parts.values()} == {""}


def test_what_a_stream_cannot_give_goes_to_the_others_in_proportion_to_their_weights():
    # Mathematics can give 2 x 50 of 1000 tokens. The other 900 are shared out 50 : 17 : 8.
    tokens = {"general": 1000, "mathematics": 50, "code": 1000, "multilingual": 1000}
    parts = mixture(LLAMA_3, tokens, total_tokens=1000, max_epochs=dict.fromkeys(LLAMA_3, 2.0))
    expected = {"general": 0.9 * 50 / 75, "mathematics": 0.1, "code": 0.9 * 17 / 75, "multilingual": 0.9 * 8 / 75}
    assert reached(parts) == pytest.approx(expected)
    assert parts["mathematics"].reason == "at its limit of epochs"
    assert parts["mathematics"].asked == 0.25
    assert parts["mathematics"].epochs == pytest.approx(2.0)
    assert parts["general"].reason == "takes tokens that other streams cannot provide"


def test_a_stream_that_passes_its_limit_only_by_what_others_leave_is_capped_too():
    # `b` holds 10 and `a` 40 of the 100; a's half becomes 0.9 x 50 / 75 = 0.6 after b, and so 0.4.
    weights = {"a": 50.0, "b": 25.0, "c": 25.0}
    limits = dict.fromkeys(weights, 1.0)
    parts = mixture(weights, {"a": 55, "b": 10, "c": 100}, total_tokens=100, max_epochs=limits)
    assert reached(parts) == pytest.approx({"a": 0.55, "b": 0.1, "c": 0.35})


def test_limits_may_differ_between_streams():
    parts = mixture({"a": 1, "b": 1}, {"a": 10, "b": 100}, total_tokens=100, max_epochs={"a": 3.0, "b": 1.0})
    assert reached(parts) == pytest.approx({"a": 0.3, "b": 0.7})


def test_where_all_streams_hold_too_little_each_passes_its_limit_by_the_same_factor():
    parts = mixture({"a": 1, "b": 9}, {"a": 10, "b": 30}, total_tokens=400, max_epochs={"a": 4.0, "b": 2.0})
    assert reached(parts) == pytest.approx({"a": 0.4, "b": 0.6})
    assert [part.epochs / part.max_epochs for part in parts.values()] == pytest.approx([4.0, 4.0])
    assert all("too few tokens" in part.reason for part in parts.values())


def test_an_empty_stream_gives_nothing_and_says_so():
    parts = mixture({"a": 1, "b": 1}, {"a": 10, "b": 0}, total_tokens=10, max_epochs={"a": 4.0, "b": 4.0})
    assert reached(parts) == {"a": 1.0, "b": 0.0}
    assert parts["b"].reason == "holds too few tokens for a row"


def test_what_was_trained_on_before_counts_towards_the_limit():
    # Of `a` 15 of 2 x 20 tokens are used, so that 25 are left of the 50 asked for.
    weights, tokens = {"a": 1.0, "b": 1.0}, {"a": 20, "b": 200}
    limits = dict.fromkeys(weights, 2.0)
    parts = mixture(weights, tokens, total_tokens=100, max_epochs=limits, used={"a": 15, "b": 100})
    assert reached(parts) == pytest.approx({"a": 0.25, "b": 0.75})
    assert [part.epochs for part in parts.values()] == pytest.approx([2.0, 0.875])
    assert parts["a"].reason == "at its limit of epochs"


def test_where_all_are_used_up_each_comes_to_the_same_factor_of_its_limit_but_for_one_beyond_it():
    # `c` had 9 epochs of 1. The others come to (20 + 10 + 70) / 50 = 2 epochs: 30 and 40 tokens more.
    tokens = {"a": 20, "b": 30, "c": 10}
    limits = dict.fromkeys(tokens, 1.0)
    parts = mixture(
        dict.fromkeys(tokens, 1.0), tokens, total_tokens=70, max_epochs=limits, used={"a": 10, "b": 20, "c": 90}
    )
    assert reached(parts) == pytest.approx({"a": 30 / 70, "b": 40 / 70, "c": 0.0})
    assert [part.epochs for part in parts.values()] == pytest.approx([2.0, 2.0, 9.0])
    assert "too few tokens" in parts["a"].reason
    assert parts["c"].reason == "at its limit of epochs"


@st.composite
def cases(draw):
    names = [f"s{index}" for index in range(draw(st.integers(1, 6)))]
    weights = {name: draw(st.integers(0, 100)) for name in names}
    weights["s0"] = max(1, weights["s0"])
    tokens = {name: draw(st.integers(1, 10**6)) for name in names}
    limits = {name: draw(st.floats(0.5, 8)) for name in names}
    return weights, tokens, draw(st.integers(1, 10**7)), limits


@given(cases())
@settings(max_examples=200, deadline=None)
def test_shares_add_up_keep_to_limits_and_are_in_proportion_where_no_limit_holds(case):
    weights, tokens, total, limits = case
    parts = mixture(weights, tokens, total_tokens=total, max_epochs=limits)
    assert sum(reached(parts).values()) == pytest.approx(1.0)
    assert all(part.reached == 0 for name, part in parts.items() if weights[name] == 0)
    asked = [name for name in weights if weights[name]]
    if sum(tokens[name] * limits[name] for name in asked) <= total:
        factors = [parts[name].epochs / limits[name] for name in asked]
        assert factors == pytest.approx([factors[0]] * len(factors))
        return
    assert all(parts[name].epochs <= limits[name] * (1 + 1e-9) for name in asked)
    free = [name for name in asked if parts[name].epochs < limits[name] * (1 - 1e-6)]
    scales = [parts[name].reached / weights[name] for name in free]
    assert scales == pytest.approx([max(scales, default=0)] * len(scales))
    # A stream at its limit would have taken more: its scale is below that of the free ones.
    assert all(parts[name].reached / weights[name] <= max(scales, default=1) * (1 + 1e-6) for name in asked)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_weights_hold_up_to_the_largest_total_and_no_further(case):
    weights, tokens, _, limits = case
    most = largest_total(weights, tokens, limits)
    if most < 100:
        return
    within = mixture(weights, tokens, total_tokens=most, max_epochs=limits)
    assert reached(within) == pytest.approx({name: part.asked for name, part in within.items()})
    beyond = mixture(weights, tokens, total_tokens=most * 1.05, max_epochs=limits)
    assert any(part.reason for part in beyond.values())


def test_without_weights_streams_count_by_their_tokens():
    weights, limits = resolve(MixtureConfig(max_epochs_of={"b": 1.0}), {"a": 30, "b": 10})
    assert weights == {"a": 30.0, "b": 10.0}
    assert limits == {"a": 4.0, "b": 1.0}
    assert resolve(MixtureConfig(weights={"b": 2}), {"a": 30, "b": 10})[0] == {"a": 0.0, "b": 2.0}


def test_a_stream_that_is_not_there_is_an_error_that_names_those_that_are():
    with pytest.raises(ConfigError, match=r"mixture\.weights: got 'code', expected streams of the tokens: a, b;"):
        resolve(MixtureConfig(weights={"code": 1}), {"a": 30, "b": 10})
    with pytest.raises(ConfigError, match=r"mixture\.max_epochs_of: got 'c'"):
        resolve(MixtureConfig(max_epochs_of={"c": 1}), {"a": 30, "b": 10})
    with pytest.raises(ConfigError, match=r"no weight above 0"):
        resolve(MixtureConfig(weights={"a": 0}), {"a": 30, "b": 10})
