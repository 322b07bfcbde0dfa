"""Parts that should add up to a value, and what it is if they do not: rounding, or something else."""

import torch

# Units of rounding, relative to the sum of absolute parts: a forward pass in float32 goes through sums that cancel, in
# half precision through fewer digits than those are lost in.
WIDE, HALF = 84, 8


def is_rounding(relative_error: float, dtype: torch.dtype) -> bool:
    """Whether a gap of this share of the absolute parts is what a forward pass in `dtype` rounds away."""
    half = torch.finfo(dtype).bits < 32
    eps = torch.finfo(dtype if half else torch.float32).eps  # of a float64 model: results are in float32
    return relative_error <= (HALF if half else WIDE) * eps


def gap_in_words(relative_error: float, dtype: torch.dtype) -> str:
    """What a reader is to make of a gap; NaN is no rounding either."""
    name = str(dtype).removeprefix("torch.")
    return f"{name} rounding" if is_rounding(relative_error, dtype) else f"MORE THAN {name} ROUNDING EXPLAINS"


class Complete:
    """What is known of parts and their value: for results that have both."""

    actual: float
    dtype: torch.dtype

    @property
    def total(self) -> float:
        """The sum of every part."""
        raise NotImplementedError

    @property
    def absolute_sum(self) -> float:
        """Sum of the parts' absolute values."""
        raise NotImplementedError

    @property
    def completeness_error(self) -> float:
        """`total - actual`, signed: rounding, and nothing else (see `is_rounding`). What has many such gaps gives the
        largest absolute one, as `largest_completeness_error`."""
        return self.total - self.actual

    @property
    def relative_error(self) -> float:
        """`|completeness_error|` over the sum of absolute parts (the value itself may be near zero)."""
        return abs(self.completeness_error) / max(self.absolute_sum, torch.finfo(torch.float32).tiny)

    @property
    def is_rounding(self) -> bool:
        """Whether the gap is what rounding explains; if not, the parts are not those of what the model computed."""
        return is_rounding(self.relative_error, self.dtype)

    @property
    def _gap(self) -> str:
        """The gap, for a table's head."""
        words = gap_in_words(self.relative_error, self.dtype)
        of_parts = f"{self.relative_error:.1e} of the absolute parts"
        return f"completeness error {self.completeness_error:+.1e} ({of_parts}: {words})"
