"""A scaling law of the loss, fitted to small runs: L = E + sum over features x of A x^-alpha.

With one feature, training FLOPs, it is the compute law of runs that are scaled alike. With two, parameters and tokens,
it is Hoffmann et al. 2022, section 3.3 (approach 3), which needs runs that vary them independently. As there, the fit
minimizes the sum of Huber losses between logarithms from many starts. Here, Levenberg-Marquardt steps with Huber
weights are vectorized over all starts.

Dimensions: S starts or samples, R runs, X features, P = 1 + 2 X parameters: log E, then for each feature the
logarithm of its term at the runs' mean and the logarithm of its exponent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lilpipe.errors import DataError

Features = Mapping[str, Sequence[float]]
"""Maps the name of a feature to its value in each run."""
HUBER_DELTA = 1e-3
"""Residual of the logarithm above which the Huber loss is linear (Hoffmann et al. 2022)."""
START_FLOORS = (0.1, 0.5, 0.8, 0.95)
"""Initial values of E, as fractions of the smallest loss."""
START_EXPONENTS = (0.05, 0.15, 0.4, 0.8)
NUM_ITERATIONS = 300
TOLERANCE, PATIENCE = 1e-6, 15
"""Descent stops after ``PATIENCE`` consecutive steps that lower no objective by a relative ``TOLERANCE``."""
SHARE = 0.9
"""Coverage of prediction intervals."""


@dataclass(frozen=True)
class Law:
    """A fitted scaling law."""

    floor: float
    """E, the irreducible loss."""
    coefficients: Mapping[str, float]
    exponents: Mapping[str, float]

    def predict(self, features: Features) -> np.ndarray:
        """Return the loss of each run, float64 [R]."""
        terms = (
            self.coefficients[name] * np.asarray(x, float) ** -self.exponents[name] for name, x in features.items()
        )
        return np.sum([np.broadcast_to(self.floor, len(next(iter(features.values())))), *terms], axis=0)

    def __str__(self) -> str:
        terms = (f"{self.coefficients[name]:.4g} {name}^-{self.exponents[name]:.3f}" for name in self.coefficients)
        return " + ".join([f"{self.floor:.4g}", *terms])


def num_unknowns(features: Features) -> int:
    """Return the number of fitted parameters; a fit needs as many runs, an interval one more."""
    return 1 + 2 * len(features)


def fit(features: Features, losses: Sequence[float]) -> Law:
    """Fit the law to runs. Raises ``DataError`` for too few runs, or runs that do not differ."""
    check(features)
    if min(losses) <= 0:
        raise DataError(f"scaling: got a loss of {min(losses)}, expected losses above 0")
    scaled = _Scaled(features)
    log_losses_1R = np.log(np.asarray(losses, float))[None]
    starts_SP = _starts(losses, len(features))
    parameters_SP, objective_S = _descend(starts_SP, scaled.logs_XR, log_losses_1R)
    return scaled.law(parameters_SP[objective_S.argmin()])


def predict_interval(
    features: Features, losses: Sequence[float], at: Features, *, num_samples: int = 400, seed: int = 0
) -> tuple[float, float] | None:
    """Return the interval that contains the loss of a new run ``at`` these features with probability ``SHARE``.

    Returns ``None`` if there are too few runs. Parametric bootstrap: adds noise of the size of the fit's residuals to
    the fitted losses, refits, and adds the noise of the new run. With d = runs - unknowns degrees of freedom, the size
    of the noise is itself uncertain, so each sample draws it from its scaled inverse chi-square distribution. The
    interval assumes that the law holds.
    """
    law, scaled = fit(features, losses), _Scaled(features)
    freedom = len(losses) - num_unknowns(features)
    if freedom < 1:
        return None
    fitted_R, rng = np.log(law.predict(features)), np.random.default_rng(seed)
    squares = np.square(fitted_R - np.log(losses)).sum()
    sigma_S = np.sqrt(squares / rng.chisquare(freedom, num_samples))
    samples_SR = fitted_R + sigma_S[:, None] * rng.standard_normal((num_samples, len(losses)))
    starts_SP = np.repeat(scaled.parameters(law)[None], num_samples, axis=0)
    parameters_SP, _ = _descend(starts_SP, scaled.logs_XR, samples_SR)
    new_S = np.array([float(scaled.law(parameters).predict(at)[0]) for parameters in parameters_SP])
    new_S = new_S * np.exp(sigma_S * rng.standard_normal(num_samples))
    low, high = np.quantile(new_S, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def check(features: Features) -> None:
    """Raise ``DataError`` if the runs do not determine a law in these features."""
    num_runs, least = len(next(iter(features.values()))), num_unknowns(features)
    if num_runs < least:
        raise DataError(
            f"scaling: got {num_runs} runs, expected at least {least} for a law in {' and '.join(features)}; add more "
            "depths"
        )
    for name, values in features.items():
        if len(set(values)) < 3:
            raise DataError(
                f"scaling: got runs with {len(set(values))} different values of {name}, expected 3 or more; use other "
                "depths, and remove settings that depth derives, such as num_layers, from the configuration"
            )


class _Scaled:
    """Logarithms of the features, centred, so that the fitted parameters are nearly independent."""

    def __init__(self, features: Features) -> None:
        self.names = list(features)
        logs_XR = np.log(np.array([features[name] for name in self.names], float))
        self.means_X = logs_XR.mean(-1)
        self.logs_XR = logs_XR - self.means_X[:, None]

    def law(self, parameters_P: np.ndarray) -> Law:
        terms_X, exponents_X = parameters_P[1::2], np.exp(parameters_P[2::2])
        coefficients_X = np.exp(terms_X + exponents_X * self.means_X)
        return Law(
            floor=float(np.exp(parameters_P[0])),
            coefficients=dict(zip(self.names, coefficients_X.tolist(), strict=True)),
            exponents=dict(zip(self.names, exponents_X.tolist(), strict=True)),
        )

    def parameters(self, law: Law) -> np.ndarray:
        parameters = [np.log(law.floor)]
        for name, mean in zip(self.names, self.means_X, strict=True):
            exponent = law.exponents[name]
            parameters += [np.log(law.coefficients[name]) - exponent * mean, np.log(exponent)]
        return np.array(parameters)


def _starts(losses: Sequence[float], num_features: int) -> np.ndarray:
    starts = []
    for share, *exponents in itertools.product(START_FLOORS, *[START_EXPONENTS] * num_features):
        floor = share * min(losses)
        term = np.log((np.mean(losses) - floor) / num_features)
        starts.append([np.log(floor), *itertools.chain(*((term, np.log(exponent)) for exponent in exponents))])
    return np.array(starts)


def _terms(parameters_SP: np.ndarray, logs_XR: np.ndarray) -> np.ndarray:
    """Return the logarithms of E and of each feature's term, [S, 1 + X, R]."""
    heights_SX, exponents_SX = parameters_SP[:, 1::2], np.exp(parameters_SP[:, 2::2])
    terms_SXR = heights_SX[..., None] - exponents_SX[..., None] * logs_XR
    floor_S1R = np.broadcast_to(parameters_SP[:, :1, None], (len(parameters_SP), 1, logs_XR.shape[1]))
    return np.concatenate([floor_S1R, terms_SXR], axis=1)


def _residuals(parameters_SP: np.ndarray, logs_XR: np.ndarray, log_losses_SR: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(_terms(parameters_SP, logs_XR), axis=1) - log_losses_SR


def _jacobian(parameters_SP: np.ndarray, logs_XR: np.ndarray) -> np.ndarray:
    """Return the residuals' Jacobian, [S, R, P]: each term's share of the loss, times its inner derivative."""
    terms = _terms(parameters_SP, logs_XR)
    shares = np.exp(terms - np.logaddexp.reduce(terms, axis=1, keepdims=True))
    columns = [shares[:, 0]]
    for number, logs_R in enumerate(logs_XR):
        share_SR, exponent_S1 = shares[:, number + 1], np.exp(parameters_SP[:, 2 + 2 * number, None])
        columns += [share_SR, -share_SR * exponent_S1 * logs_R]
    return np.stack(columns, axis=-1)


def _huber(residuals: np.ndarray) -> np.ndarray:
    size = np.abs(residuals)
    return np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))


def _descend(
    parameters_SP: np.ndarray, logs_XR: np.ndarray, log_losses_SR: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimize the sum of Huber losses from each start; return parameters [S, P] and the sums [S]."""
    parameters_SP = parameters_SP.copy()
    damping_S = np.full(len(parameters_SP), 1e-2)
    residuals_SR = _residuals(parameters_SP, logs_XR, log_losses_SR)
    objective_S = _huber(residuals_SR).sum(-1)
    diagonal = np.arange(parameters_SP.shape[1])
    idle = 0
    for _ in range(NUM_ITERATIONS):
        jacobian_SRP = _jacobian(parameters_SP, logs_XR)
        weights_SR = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residuals_SR), 1e-12))
        weighted_SRP = weights_SR[..., None] * jacobian_SRP
        normal_SPP = weighted_SRP.transpose(0, 2, 1) @ jacobian_SRP
        gradient_SP = (weighted_SRP * residuals_SR[..., None]).sum(1)
        normal_SPP[:, diagonal, diagonal] *= 1 + damping_S[:, None]
        normal_SPP[:, diagonal, diagonal] += 1e-12
        steps_SP = np.linalg.solve(normal_SPP, gradient_SP[..., None])[..., 0]
        tried_SP = parameters_SP - np.clip(steps_SP, -1, 1)
        tried_SR = _residuals(tried_SP, logs_XR, log_losses_SR)
        tried_S = _huber(tried_SR).sum(-1)
        better_S = tried_S < objective_S
        parameters_SP[better_S], residuals_SR[better_S] = tried_SP[better_S], tried_SR[better_S]
        idle = 0 if (tried_S < (1 - TOLERANCE) * objective_S).any() else idle + 1
        if idle == PATIENCE:
            break
        objective_S = np.minimum(objective_S, tried_S)
        damping_S = np.clip(np.where(better_S, damping_S / 3, damping_S * 4), 1e-9, 1e9)
    return parameters_SP, objective_S
