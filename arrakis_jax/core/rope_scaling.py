"""The scaling of rotary frequencies, as a value."""

from dataclasses import dataclass
from typing import Any, Literal

from arrakis_jax.core.errors import expected

# What each kind of scaling needs, apart from `kind` and `attention_factor`.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_positions"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_positions"),
    "longrope": ("short_factor", "long_factor", "original_max_positions"),
}


def is_number(value: Any) -> bool:
    """Whether this is a finite number; a bool is none."""
    # The bounds are those of a float, minus a margin; NaN and ints too large for a float fail them.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those first trained on.

    Attributes:
        kind: "llama3" (long wavelengths are slowed down, short ones kept), "linear" (all are
            slowed down), "dynamic" (the base grows with the length of the prompt), "yarn"
            (interpolated by rotations), or "longrope" (a factor for each frequency, one list for
            batches that fit the first context, and one for longer ones).
        factor: how much longer the context becomes.
        low_freq_factor: llama3: wavelengths above `original_max_positions / low_freq_factor` are
            divided by `factor` in frequency.
        high_freq_factor: llama3: wavelengths below `original_max_positions / high_freq_factor` are
            kept; between the two the frequency is interpolated.
        original_max_positions: the context of the first training, in tokens.
        beta_fast: yarn: frequencies that turn more often than this in the first context are kept.
        beta_slow: yarn: those that turn less often are divided by `factor`.
        truncate: yarn: whether the bounds of the interpolation are rounded to whole dimensions.
        short_factor: longrope: a divisor for each frequency.
        long_factor: longrope: the same, for prompts longer than the first context.
        attention_factor: multiplies cosines and sines (so that scores grow by its square).
    """

    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None
    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"] = "llama3"
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            must = f"one of {tuple(ROPE_SCALINGS)}"
            raise ValueError(expected("kind", must, repr(self.kind), "choose one"))
        for name in (*ROPE_SCALINGS[self.kind], "attention_factor"):
            value, listed = getattr(self, name), name in ("short_factor", "long_factor")
            values = value if listed and isinstance(value, tuple) else (value,)
            right = bool(values) and all(is_number(v) and v > 0 for v in values)
            if not right or listed != isinstance(value, tuple):
                must = "a tuple of numbers > 0" if listed else "a number > 0"
                do = f"a scaling of kind {self.kind!r} needs it"
                raise ValueError(expected(name, must, repr(value), do))
