"""How many singular values to keep: a rank, a share of the energy, a ratio, or a share of the Frobenius norm."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from studio.errors import ConfigError


@dataclass(frozen=True)
class Cut:
    """The smallest rank that fulfils one criterion, and `rank` at most; without any, nothing is cut.

    With the singular values s in falling order: `energy` in (0, 1] keeps that share of the sum of s^2;
    `frobenius` in (0, 1] that share of its root, the Frobenius norm (kohya's sv_fro); `sv_ratio` >= 1 keeps
    the values of at least s_1 / sv_ratio (kohya's sv_ratio, whose own count is one or two more). At least 1 is
    kept, where all are zero too. Raises ConfigError for values out of range, or for two criteria at once.
    """

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    frobenius: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be 1 or more")
        criteria = [name for name in ("energy", "sv_ratio", "frobenius") if getattr(self, name) is not None]
        if len(criteria) > 1:
            raise ConfigError(f"{' and '.join(criteria)} both choose the rank: give one of them")
        for name in ("energy", "frobenius"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}; it must be above 0, and 1 at most")
        if self.sv_ratio is not None and not self.sv_ratio >= 1:
            raise ConfigError(f"sv_ratio is {self.sv_ratio}; it must be 1 or more")

    @property
    def dynamic(self) -> bool:
        """Whether the singular values choose the rank."""
        return any(one is not None for one in (self.energy, self.sv_ratio, self.frobenius))

    def stated(self) -> dict[str, float]:
        """The criteria that were given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def shortens(self, rank: int) -> bool:
        """Whether a product of `rank` may have to become one of less."""
        return self.dynamic or (self.rank is not None and self.rank < rank)

    def keeps(self, values: Tensor) -> int:
        """How many of `values` (groups, r) to keep in every group; `rank` is that of one group here."""
        found = values.shape[1]
        kept = found if self.rank is None else min(self.rank, found)
        if self.sv_ratio is not None:
            kept = min(kept, int(((values * self.sv_ratio >= values[:, :1]) & (values > 0)).sum(1).max()))
        share = self.energy if self.frobenius is None else self.frobenius**2
        if share is not None:
            squares = values.double().square().sum(0)  # (r,)
            missing = squares.flip(0).cumsum(0).flip(0)  # what is lost when this value is the first to go
            # rounding may make a share of exactly 1 unreachable: what is below fp32's resolution is not missing
            allowed = max(1 - share, 1e-12) * missing[0]
            kept = min(kept, int((missing > allowed).sum()))
        return max(kept, 1)
