"""A law of loss, model size and data from finished runs, and the best use of a budget under it.

L loss, N parameters, D tokens, C floating-point operations of training; Hoffmann et al. 2022, "Training
Compute-Optimal Large Language Models".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from omniloom.errors import ConfigError

Counted = Literal["active", "total"]
FLOPS_PER_PARAMETER_TOKEN = 6
HUBER_DELTA = 1e-3
# The paper's grid of starts, appendix D.2.
START_EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
START_LOG_E = (-1.0, -0.5, 0.0, 0.5, 1.0)
START_LOG_FACTORS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
MOST_EXPONENT = 4.0
LEAST_POINTS, LEAST_VALUES = 6, 3  # five numbers and a residual; an exponent takes three values
MOST_CORRELATION = 0.999
WARM_STARTS = 2
MOST_LOG = 300.0  # of a size or an amount of data that means anything
COVERAGE = 0.95
APART = 0.02  # exponents, of two minima
SMALLEST = 1e-300


@dataclass(frozen=True)
class RunPoint:
    """What one run measured at its end, its schedule gone through."""

    name: str
    params_active: int
    params_total: int
    tokens: int
    loss: float

    def params(self, counted: Counted) -> int:
        """N, by the one count or the other."""
        return self.params_active if counted == "active" else self.params_total

    @property
    def flops(self) -> float:
        """C = 6·N_active·D."""
        return float(FLOPS_PER_PARAMETER_TOKEN) * self.params_active * self.tokens


@dataclass(frozen=True)
class Optimum:
    """The model and the data of least loss for a budget, and that loss."""

    params: float
    tokens: float
    loss: float

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.params


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A/N^α + B/D^β (eq. 2), and Σ huber_δ(log L(N, D) − log L) over the points it was fitted to."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    huber: float

    def loss(self, params: float, tokens: float) -> float:
        """L(N, D)."""
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def optimum(self, budget_flops: float) -> Optimum:
        """Least loss at C = 6·N·D: N = G·(C/6)^(β/(α+β)), D = (C/6)^(α/(α+β))/G, G = (αA/(βB))^(1/(α+β)) (eq. 4).

        Raises ConfigError where the loss does not fall with both: the best would be no model, or no data.
        """
        for name, exponent, factor, power in (("N", "α", self.A, self.alpha), ("D", "β", self.B, self.beta)):
            if not factor * power > 0:
                raise ConfigError(f"in these runs the loss does not fall with {name} ({exponent}={power:.3g})")
        powers = self.alpha + self.beta
        log_g = (math.log(self.alpha * self.A) - math.log(self.beta * self.B)) / powers
        log_c = math.log(budget_flops / FLOPS_PER_PARAMETER_TOKEN)
        log_n = log_g + log_c * self.beta / powers
        if max(abs(log_n), abs(log_c - log_n)) > MOST_LOG:
            raise ConfigError(
                f"in these runs the loss hardly falls with N and D (α={self.alpha:.3g}, β={self.beta:.3g})"
            )
        params, tokens = math.exp(log_n), math.exp(log_c - log_n)
        return Optimum(params, tokens, self.loss(params, tokens))


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its interval of 95%."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A law fitted to points, N counted one way, and the laws of the points drawn again with replacement."""

    counted: Counted
    points: tuple[RunPoint, ...]
    law: Law
    resampled: tuple[Law, ...]

    def predicted(self, point: RunPoint) -> float:
        """The law's loss for a run."""
        return self.law.loss(point.params(self.counted), point.tokens)

    @property
    def rms_log_residual(self) -> float:
        """√ mean (log L(N, D) − log L)² over the points: the typical deviation, as a share of the loss."""
        residuals = [math.log(self.predicted(point) / point.loss) for point in self.points]
        return math.sqrt(sum(residual**2 for residual in residuals) / len(residuals))

    def interval(self, of: Callable[[Law], float]) -> Interval:
        """What a law gives, with the percentiles 2.5 and 97.5 of the resampled laws; those that refuse are left out."""
        low, high = np.quantile(_given(self.resampled, of), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        return Interval(of(self.law), float(low), float(high))

    def number(self, name: str) -> Interval:
        """One of the law's own: E, A, B, alpha, beta."""
        return self.interval(lambda law: float(getattr(law, name)))

    @property
    def without_optimum(self) -> int:
        """How many of the resampled laws have no best use of any budget."""
        return len(self.resampled) - len(_given(self.resampled, lambda law: law.optimum(1.0).params))


def _given(laws: Sequence[Law], of: Callable[[Law], float]) -> list[float]:
    given = []
    for law in laws:
        try:
            given.append(of(law))
        except ConfigError:
            continue
    return given or [math.nan]


def check_points(points: Sequence[RunPoint], counted: Counted) -> None:
    """Raise ConfigError where no law can be told from the points."""
    for point in points:
        for name, value in (("loss", point.loss), ("N", point.params(counted)), ("D", point.tokens)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{point.name}: {name}={value:g} must be a number above 0")
    if len(points) < LEAST_POINTS:
        raise ConfigError(
            f"five numbers, E, A, B, α and β, are told from at least {LEAST_POINTS} runs: here are {len(points)}; N "
            "and D must each take several values: sweep model=choice(…) and train.steps=choice(…)"
        )
    sizes, lengths = {point.params(counted) for point in points}, {point.tokens for point in points}
    for name, values, key in (("N", sizes, "model=choice(…)"), ("D", lengths, "train.steps=choice(…)")):
        if len(values) < LEAST_VALUES:
            raise ConfigError(
                f"an exponent is told from at least {LEAST_VALUES} values: of {name} here are {len(values)} "
                f"({', '.join(f'{value:,}' for value in sorted(values))}); sweep {key} too"
            )
    logs = np.log([[point.params(counted), point.tokens] for point in points])
    correlation = abs(float(np.corrcoef(logs.T)[0, 1]))
    if correlation > MOST_CORRELATION:
        raise ConfigError(
            f"N and D go together in these runs (correlation of their logarithms {correlation:.4f}, over "
            f"{MOST_CORRELATION}): what each does cannot be told apart; train some sizes on other amounts of data"
        )


def fit_law(points: Sequence[RunPoint], counted: Counted, resamples: int, seed: int) -> Fit:
    """Fit L(N, D) by approach 3 (section 3.3, appendix D.2), with `resamples` fits to runs drawn with replacement.

    min over e, a, b, α, β of Σ huber_δ(LSE(a − α log N, b − β log D, e) − log L) (eq. 3), δ = 1e-3, by L-BFGS;
    E = exp e, A = exp a, B = exp b. Of the grid's 4,500 starts the best of each pair of exponents is gone on from.
    Ours is the sum, in units of δ, run to its end: on the paper's scale the optimizer stops early, which made its
    intervals too narrow (Besiroglu et al. 2024). Raises ConfigError as `check_points` does.
    """
    check_points(points, counted)
    table = np.array([[point.params(counted), point.tokens, point.loss] for point in points], dtype=np.float64)
    with threadpool_limits(1, "blas"):  # matrices of 5 × 5: threads would take fifteen times as long
        minima = sorted((_minimum(start, table) for start in _starts(table)), key=lambda law: law.huber)
        warm = [_start_of(law) for law in _distinct(minima)[:WARM_STARTS]]
        generator = np.random.default_rng(seed)
        draws = (_drawn(table, generator) for _ in range(resamples))
        resampled = [min((_minimum(start, drawn) for start in warm), key=lambda law: law.huber) for drawn in draws]
    return Fit(counted, tuple(points), minima[0], tuple(resampled))


def fit_laws(points: Sequence[RunPoint], resamples: int, seed: int) -> tuple[Fit, ...]:
    """By active parameters and, where total ones are others, as in mixtures of experts, and tell a law, by those."""
    active = fit_law(points, "active", resamples, seed)
    if all(point.params_active == point.params_total for point in points):
        return (active,)
    try:
        return (active, fit_law(points, "total", resamples, seed))
    except ConfigError:  # the same experts, more or fewer of them chosen
        return (active,)


def objective(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_l: np.ndarray) -> tuple[float, np.ndarray]:
    """Eq. 3 in units of δ, and its gradient by θ = (e, a, b, α, β)."""
    e, a, b, alpha, beta = theta
    terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
    top = terms.max(axis=0)
    parts = np.exp(terms - top)
    whole = parts.sum(axis=0)
    residual = top + np.log(whole) - log_l
    size = np.abs(residual)
    value = np.where(size <= HUBER_DELTA, residual**2 / (2 * HUBER_DELTA), size - HUBER_DELTA / 2).sum()
    slopes = np.clip(residual / HUBER_DELTA, -1, 1) * parts / whole  # of the loss by each term
    by_e, by_a, by_b = slopes.sum(axis=1)
    return float(value), np.array([by_e, by_a, by_b, -slopes[1] @ log_n, -slopes[2] @ log_d])


def _minimum(start: np.ndarray, table: np.ndarray) -> Law:
    """L-BFGS from θ; log N and log D are counted from their means, which keeps a and α apart."""
    logs = np.log(table)
    mean_n, mean_d = logs[:, 0].mean(), logs[:, 1].mean()
    e, a, b, alpha, beta = start
    found = minimize(
        objective,
        np.array([e, a - alpha * mean_n, b - beta * mean_d, alpha, beta]),
        args=(logs[:, 0] - mean_n, logs[:, 1] - mean_d, logs[:, 2]),
        method="L-BFGS-B",
        jac=True,
        bounds=[(None, None)] * 3 + [(0.0, MOST_EXPONENT)] * 2,
        options={"maxiter": 2_000, "maxfun": 5_000, "ftol": 1e-13, "gtol": 1e-9},
    )
    e, a, b, alpha, beta = found.x
    a, b = a + alpha * mean_n, b + beta * mean_d
    return Law(math.exp(e), math.exp(a), math.exp(b), float(alpha), float(beta), float(found.fun) * HUBER_DELTA)


def _starts(table: np.ndarray) -> list[np.ndarray]:
    """For each pair of exponents of the paper's grid, the θ of its other numbers at which eq. 3 is least."""
    log_n, log_d, log_l = np.log(table).T
    rest = np.array(list(product(START_LOG_E, START_LOG_FACTORS, START_LOG_FACTORS)))
    starts = []
    for alpha, beta in product(START_EXPONENTS, START_EXPONENTS):
        thetas = np.column_stack([rest, np.broadcast_to((alpha, beta), (len(rest), 2))])
        values = [objective(theta, log_n, log_d, log_l)[0] for theta in thetas]
        starts.append(thetas[int(np.argmin(values))])
    return starts


def _start_of(law: Law) -> np.ndarray:
    logs = [math.log(max(value, SMALLEST)) for value in (law.E, law.A, law.B)]
    return np.array([*logs, law.alpha, law.beta])


def _distinct(laws: Sequence[Law]) -> list[Law]:
    """Of laws with nearly the same exponents the first."""
    kept: list[Law] = []
    for law in laws:
        if all(max(abs(law.alpha - other.alpha), abs(law.beta - other.beta)) > APART for other in kept):
            kept.append(law)
    return kept


def _drawn(table: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many rows, drawn with replacement; again where they hold too few values of N or D for an exponent."""
    while True:
        drawn = table[generator.integers(len(table), size=len(table))]
        if min(len(np.unique(drawn[:, 0])), len(np.unique(drawn[:, 1]))) >= LEAST_VALUES:
            return drawn
