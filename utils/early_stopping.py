"""When to stop: no significant gain in SSIM, paired by film, for a number of validations."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class EarlyStopping:
    """The best step so far, and how many validations have passed since the last gain that is more than chance.

    A validation is a gain where the mean of its films' differences from the last gain exceeds twice the standard error
    of that mean. Films differ among themselves far more (0.09 in SSIM) than one film does between two checkpoints
    (0.001), so only the paired difference can tell. Many small steps upward add up, because the reference stays put.

    Attributes:
        patience: validations without a gain after which `should_stop`; 0 never stops.
        best_step, best: where the mean was highest, the step whose adapter is kept; 0 and None before the first.
        reference_step, reference: the last gain and its value of every film.
        waited: validations since.
    """

    patience: int
    best_step: int = 0
    best: float | None = None
    reference_step: int = 0
    reference: list[float] = field(default_factory=list)
    waited: int = 0

    def update(self, step: int, ssim: Sequence[float]) -> bool:
        """Take in a validation, one value a film, and return whether it is the best so far."""
        if self.reference and not self._is_gain(ssim):
            self.waited += 1
        else:
            self.reference_step, self.reference, self.waited = step, list(ssim), 0
        mean = statistics.fmean(ssim)
        if self.best is not None and mean <= self.best:
            return False
        self.best_step, self.best = step, mean
        return True

    def _is_gain(self, ssim: Sequence[float]) -> bool:
        differences = [new - old for new, old in zip(ssim, self.reference, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        return statistics.fmean(differences) > 2 * error

    @property
    def should_stop(self) -> bool:
        """Whether patience is spent."""
        return 0 < self.patience <= self.waited
