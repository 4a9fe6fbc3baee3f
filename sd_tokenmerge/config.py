"""`MergeConfig`: every merging option, declared once, and the presets. Imports no torch.

`apply_patch`, the command line, `run.json`, sweeps, captions and reports all derive their options
from the fields of `MergeConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from sd_tokenmerge.keep_rates import KeepRate, KeepRateLike, format_keep_rates, parse_keep_rates
from sd_tokenmerge.options import option, require_options

Features = Literal["input", "keys"]
Merge = Literal["qkv", "kv", "q", "two-sided"]


@dataclass(frozen=True)
class MergeConfig:
    """How tokens are merged around self-attention.

    Attributes:
        method: a `Method` or its string, such as `"atc"` or `"atc:linkage=complete"`.
        keep_rate: fraction of the tokens that is kept, in (0, 1]; 1 merges nothing. `Linear` and
            `During` change it over the denoising steps, `Depth` over the blocks; a dict sets one
            keep rate per level, finest 0, and merges no other level. Strings work as well:
            `"0.5"`, `"50%"`, `"linear:first=1,last=0.4"`, `"0=0.5,1=depth:rate=0.8"`. Stored as a
            `KeepRate`, or a dict of them by level.
        levels: how many of the finest resolutions with self-attention are merged, at least 1.
            None: 1, or the levels that `keep_rate` names.
        merge: `"qkv"` merges queries, keys and values, and gives each token its cluster's output
            (the papers). `"kv"` keeps every query and attends to merged keys and values. `"q"`
            attends with merged queries to every key and value. `"two-sided"` is `"kv"`, corrected
            by the error that `"kv"` makes at each cluster's mean query; see `docs/forms.md`.
        features: what the method clusters: the block's `"input"`, as in ToMe-SD's and ATC's
            experiments, or the attention's `"keys"`, averaged over its heads, as in ATC's text.
        refresh_every: denoising steps that share a partition, at least 1. A step is an entry of
            the scheduler's `timesteps`; second-order schedulers have two entries per step.
        share_layers: whether all blocks of a level use the partition of the level's first block.
        proportional_attention: whether each merged key is weighted by its number of tokens (ToMe,
            section 3). None: True for `merge="kv"` and `"two-sided"`, False for `"qkv"` and `"q"`.
            Must not be True for `"q"`, which merges no keys, nor False for `"two-sided"`.
        first_order: whether attention to clusters has a first-order correction for the keys'
            deviations from their clusters' means (`docs/forms.md`). None: True for `merge="kv"` and
            `"two-sided"` if merged keys are weighted by their sizes and are their clusters' means
            (K-Medoids takes medoids). Must not be True elsewhere.
        seed: seed of random methods, combined with block and timestep; in [0, 2^63).
    """

    method: Any = option(
        'The merging method, such as "atc:linkage=average" or "tome-sd"; see '
        "`sd-tokenmerge methods`.",
        default="atc",
    )
    keep_rate: KeepRateLike | Mapping[int, KeepRateLike] = option(
        "Fraction of the tokens that is kept, in (0, 1], or a percentage (50%). It can change over "
        "the steps (linear:first=1,last=0.4 or during:rate=0.5,start=0,stop=0.6), over the blocks "
        "(depth:rate=0.7) or by level, finest 0 (0=0.5,1=depth:rate=0.8).",
        default=0.5,
    )
    levels: int | None = option(
        "Number of the finest resolutions with self-attention to merge.",
        default=None,
        at_least=1,
        when_none="1, or the levels that the keep rate names",
    )
    merge: Merge = option(
        "What is merged: queries, keys and values; keys and values only; queries only; or keys and "
        "values, corrected by exact attention of merged queries.",
        default="qkv",
    )
    features: Features = option(
        "What the method clusters: the block's input, or the attention's keys averaged over heads.",
        default="input",
    )
    refresh_every: int = option(
        "Denoising steps that share a partition.", default=1, at_least=1, below=2**31
    )
    share_layers: bool = option(
        "Use the partition of a level's first block in all blocks of the level.",
        default=False,
    )
    proportional_attention: bool | None = option(
        "Weight each merged key by its number of tokens.",
        default=None,
        when_none="on for kv and two-sided, off for qkv and q",
    )
    first_order: bool | None = option(
        "Correct attention to clusters for the keys' deviations from their means.",
        default=None,
        when_none="on for kv and two-sided, where merged keys are weighted means",
    )
    seed: int = option(
        "Seed of random methods.", default=0, at_least=0, below=2**63, flag="--merge-seed"
    )

    def __post_init__(self) -> None:
        """Check every option; the method string is checked where it is parsed.

        Raises:
            TypeError: an option is of the wrong type.
            ValueError: an option is out of range, or two options contradict each other.
        """
        require_options(self)
        object.__setattr__(self, "keep_rate", parse_keep_rates(self.keep_rate))
        if self.levels is not None and not isinstance(self.keep_rate, KeepRate):
            raise ValueError(
                f"`levels` must be left out when `keep_rate` names them, got {self.levels}."
            )
        if self.proportional_attention and self.merge == "q":
            raise ValueError(
                "`proportional_attention` must be False for merge='q', which merges no keys."
            )
        if self.proportional_attention is False and self.merge == "two-sided":
            raise ValueError("`proportional_attention` must be True for merge='two-sided'.")
        if self.first_order and not self._allows_first_order:
            raise ValueError(
                "`first_order` must be False, except for merge='kv' and 'two-sided' with "
                "proportional attention."
            )
        if self.share_layers and any(rate.varies_over_blocks for rate in self.keep_rates):
            raise ValueError("`share_layers` must be False with a keep rate that differs by block.")

    @property
    def by_level(self) -> dict[int, KeepRate] | None:
        """The keep rate of each level; None if all levels have the same."""
        rates: Any = self.keep_rate
        return None if isinstance(rates, KeepRate) else rates

    @property
    def keep_rates(self) -> tuple[KeepRate, ...]:
        """The keep rate, or the keep rate of each level."""
        rate: Any = self.keep_rate
        return (rate,) if self.by_level is None else tuple(self.by_level.values())

    @property
    def weights_keys(self) -> bool:
        """Whether each merged key is weighted by its number of tokens."""
        if self.proportional_attention is None:
            return self.merge in ("kv", "two-sided")
        return self.proportional_attention

    @property
    def corrects_to_first_order(self) -> bool:
        """Whether attention to clusters has the first-order term."""
        if self.first_order is None:
            return self._allows_first_order and not self.parsed_method.has_representatives
        return self.first_order

    @property
    def _allows_first_order(self) -> bool:
        return self.merge in ("kv", "two-sided") and self.weights_keys

    @property
    def parsed_method(self) -> Any:
        """The method itself.

        Raises:
            TypeError: `method` is neither a string nor a method.
            ValueError: the method is unknown, or one of its options is invalid, or it can't have
                the first-order term.
        """
        from sd_tokenmerge.methods import parse_method

        method = parse_method(self.method)
        if self.first_order and method.has_representatives:
            raise ValueError(
                "`first_order` must be False for a method that represents clusters by one of their "
                f"tokens, got {method}."
            )
        return method

    def differing(self) -> dict[str, Any]:
        """The options other than method and keep rate that differ from their defaults."""
        return {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name not in ("method", "keep_rate")
            and getattr(self, entry.name) != entry.default
        }

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values, with method and keep rate in canonical form."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {
            "method": str(self.parsed_method),
            "keep_rate": format_keep_rates(self.keep_rate),  # type: ignore[arg-type]
        }

    def resolved(self) -> MergeConfig:
        """The same options, spelled out: equal for configs that do the same."""
        return replace(
            self,
            method=str(self.parsed_method),
            levels=1 if self.levels is None and self.by_level is None else self.levels,
            proportional_attention=self.weights_keys,
            first_order=self.corrects_to_first_order,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MergeConfig:
        """The inverse of `to_json`; a missing option has its default.

        Raises:
            TypeError: an option is unknown or of the wrong type.
            ValueError: an option is out of range.
        """
        _require_names(values)
        return cls(**values)

    def __str__(self) -> str:
        """The method, the keep rate, and every option that differs from its default."""
        rest = [
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in self.differing().items()
        ]
        rate = format_keep_rates(self.keep_rate)  # type: ignore[arg-type]
        return ", ".join([str(self.method), f"keep rate {rate}", *rest])


def _two_sided(method: str, keep_rate: float) -> MergeConfig:
    return MergeConfig(method, keep_rate, merge="two-sided", refresh_every=2)


PRESETS: Mapping[str, MergeConfig] = MappingProxyType(
    {
        "paper": MergeConfig(),
        "near-lossless": _two_sided("tome-sd:stride=4,lloyd=3", 0.125),
        "balanced": _two_sided("tome-sd:stride=4,lloyd=2", 0.0625),
        "fast": _two_sided("tome-sd:stride=5,lloyd=2", 0.04),
    }
)
"""Options that belong together.

`"paper"` is the papers' form, for comparing methods. The others use the two-sided form with
ToMe-SD's clusters, improved by two or three iterations of K-Means and kept for two steps. They
compute 27, 13 and 8 % of the attention's products. `docs/benchmarks.md` shows what each costs and
saves.
"""


def make_config(method: Any = None, *, preset: str = "paper", **options: Any) -> MergeConfig:
    """A preset with some of its options replaced.

    Args:
        method: replaces the preset's method; None keeps it.
        preset: a name from `PRESETS`.
        options: fields of `MergeConfig`; None keeps the preset's value.

    Raises:
        TypeError: an option is unknown or of the wrong type.
        ValueError: the preset is unknown, or an option is out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    _require_names(options)
    given = {name: value for name, value in options.items() if value is not None}
    if method is not None:
        given["method"] = method
    return replace(PRESETS[preset], **given)


def _require_names(options: Mapping[str, Any]) -> None:
    known = [entry.name for entry in fields(MergeConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"a merging option must be one of {', '.join(known)}, got {name!r}.")
