import numpy as np
import pytest

from lilpipe.errors import DataError
from lilpipe.scaling.law import fit, num_unknowns, predict_interval

FLOPS = (10.0 ** np.linspace(13, 16, 6)).tolist()
PARAMETERS = (10.0 ** np.array([5, 5.5, 6, 6.5])).repeat(3)
TOKENS = PARAMETERS * np.tile([10, 20, 80], 4)


def compute_law(flops):
    return 1.5 + 2_000 * np.asarray(flops) ** -0.25


def chinchilla(parameters, tokens):
    """Hoffmann et al. 2022, equation 10."""
    return 1.69 + 406.4 * np.asarray(parameters) ** -0.34 + 410.7 * np.asarray(tokens) ** -0.28


def interval(*arguments, **options):
    found = predict_interval(*arguments, **options)
    assert found is not None
    return found


def test_a_law_of_compute_is_found_where_there_is_no_noise():
    law = fit({"FLOPs": FLOPS}, compute_law(FLOPS).tolist())
    assert law.floor == pytest.approx(1.5, rel=1e-3)
    assert law.exponents["FLOPs"] == pytest.approx(0.25, rel=1e-3)
    assert law.coefficients["FLOPs"] == pytest.approx(2_000, rel=0.01)
    assert law.predict({"FLOPs": [1e20]})[0] == pytest.approx(compute_law(1e20), rel=1e-3)


def test_chinchillas_law_is_found_from_runs_that_vary_parameters_and_tokens_apart():
    features = {"parameters": PARAMETERS.tolist(), "tokens": TOKENS.tolist()}
    law = fit(features, chinchilla(PARAMETERS, TOKENS).tolist())
    assert law.floor == pytest.approx(1.69, rel=0.01)
    assert law.exponents == pytest.approx({"parameters": 0.34, "tokens": 0.28}, rel=0.01)
    assert law.coefficients == pytest.approx({"parameters": 406.4, "tokens": 410.7}, rel=0.05)


def test_the_fit_is_the_one_that_scipy_finds_from_the_true_law():
    minimize = pytest.importorskip("scipy.optimize").minimize
    rng = np.random.default_rng(3)
    losses = compute_law(FLOPS) * np.exp(0.01 * rng.standard_normal(6))

    def huber(parameters):
        floor, height, exponent = parameters
        predicted = np.logaddexp(floor, height - exponent * np.log(np.array(FLOPS) / 1e14))
        size = np.abs(predicted - np.log(losses))
        return np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()

    start = [np.log(1.5), np.log(2_000 * 1e14**-0.25), 0.25]
    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000}
    theirs = minimize(huber, start, method="Nelder-Mead", options=options).fun
    law = fit({"FLOPs": FLOPS}, losses.tolist())
    exponent = law.exponents["FLOPs"]
    ours = huber([np.log(law.floor), np.log(law.coefficients["FLOPs"] * 1e14**-exponent), exponent])
    assert ours <= theirs * 1.001


def test_one_run_that_went_wrong_moves_the_law_little():
    losses = compute_law(FLOPS)
    losses[2] *= 1.2
    predicted = fit({"FLOPs": FLOPS}, losses.tolist()).predict({"FLOPs": [1e17]})[0]
    assert predicted == pytest.approx(compute_law(1e17), rel=0.01)


def test_intervals_hold_about_as_many_new_runs_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for seed in range(12):
        losses = compute_law(FLOPS) * np.exp(0.005 * rng.standard_normal(6))
        low, high = interval({"FLOPs": FLOPS}, losses.tolist(), {"FLOPs": [1e17]}, num_samples=60, seed=seed)
        held += low <= compute_law(1e17) * np.exp(0.005 * rng.standard_normal()) <= high
    assert 9 <= held <= 12


def test_an_interval_is_wider_the_further_away_and_the_noisier_the_runs():
    noise = np.random.default_rng(1).standard_normal(6)

    def width(sigma, at):
        losses = (compute_law(FLOPS) * np.exp(sigma * noise)).tolist()
        low, high = interval({"FLOPs": FLOPS}, losses, {"FLOPs": [at]}, num_samples=100)
        return high - low

    assert width(0.002, 1e16) < width(0.002, 1e20) < width(0.02, 1e20)


def test_as_many_runs_as_unknowns_give_a_law_without_an_interval():
    features, losses = {"FLOPs": FLOPS[:3]}, compute_law(FLOPS[:3]).tolist()
    assert num_unknowns(features) == 3
    assert fit(features, losses).predict({"FLOPs": [1e15]})[0] == pytest.approx(compute_law(1e15), rel=0.01)
    assert predict_interval(features, losses, {"FLOPs": [1e15]}) is None


@pytest.mark.parametrize(
    ("features", "losses", "message"),
    [
        ({"FLOPs": [1e13, 1e14]}, [3.0, 2.0], "got 2 runs, expected at least 3"),
        ({"FLOPs": [1e13, 1e13, 1e14]}, [3.0, 3.0, 2.0], "2 different values of FLOPs"),
        ({"FLOPs": [1e13, 1e14, 1e15]}, [3.0, 0.0, 2.0], "got a loss of 0.0"),
    ],
)
def test_runs_that_tell_no_law_are_refused(features, losses, message):
    with pytest.raises(DataError, match=message):
        fit(features, losses)
