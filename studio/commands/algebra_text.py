"""What `blend`, `resize`, `extract` and `merge` say of what they made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.terminal import program

if TYPE_CHECKING:
    from studio.algebra import CombinedState
    from studio.algebra.analyze import Analysis, Pair
    from studio.algebra.merge import Merge


def summary(made: CombinedState, result: Mapping[str, Any], source: str) -> list[str]:
    """The file, what it was made of, and what it holds."""
    ranks = sorted(set(made.report.ranks.values()))
    full = len(made.tensors) - len(made.report.ranks)
    parts = [f"{result['layers']} layers"]
    if ranks:
        parts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    if full:
        parts.append(f"{full} of them as full differences (--rank 32 makes LoRA of most)")
    if made.embeddings:
        parts.append(f"the tokens {', '.join(made.embeddings)}")
    return [f"{result['file']}: {source}", f"holds       {', '.join(parts)}; {result['bytes'] / 1e6:.1f} MB"]


def exactness(made: CombinedState) -> Iterator[str]:
    """How near the file is to what was asked for, and where its parts disagree."""
    report = made.report
    rounded = f"; half precision rounds {report.rounding:.2%} of it" if report.rounding else ""
    if any(report.residuals.values()):
        off = f"it is {report.residual:.2%} off the exact change"
        yield f"kept        {report.energy_kept:.2%} of the energy: {off}{rounded}"
    else:
        yield f"exact       nothing was cut: at strength 1, it is the whole change{rounded}"
    if report.sign_conflicts:
        yield f"conflicts   {report.sign_conflict:.0%} of the weights are pulled in opposite directions"
    if report.partial:
        yield f"partial     {len(report.partial)} layers are not in all of the parts"
    if report.left_out:
        named = ", ".join(report.left_out[:3])
        yield f"left out    {len(report.left_out)} that differ, or have no weight: {named} (--json lists all)"


def merge_text(made: Merge, source: str) -> Iterator[str]:
    """The new base, what changed, what its precision lost, and what to do with it."""
    yield f"{made.path}: {source}"
    yield f"changed     {len(made.lost)} layers; all else is the base's, byte for byte"
    name, share = next(iter(made.lost.items()))
    if share:
        yield f"rounding    the base's precision lost {made.mean_loss:.2%} of the change, at most {share:.2%} ({name})"
    yield f'use it      {" ".join(program())} generate "..." --model {made.path}'


def analysis_text(found: Analysis, picture: Path | None) -> Iterator[str]:
    """Every pair, and strengths to try."""
    yield "Will they fight?  0: they leave each other alone. 1: the weaker one's effect is doubled (+) or lost (-)."
    for pair in found.pairs:
        yield from _pair_text(pair)
    weights = zip(found.names, found.weights, found.suggested, strict=True)
    tried = [f"{name}:{new:.2f}" for name, _, new in weights]
    changed = any(abs(new - old) > 0.005 for old, new in zip(found.weights, found.suggested, strict=True))
    yield f"try         {' '.join(tried)}" if changed else "try         these weights: they are balanced"
    if picture:
        yield f"picture     {picture}"


def _pair_text(pair: Pair) -> Iterator[str]:
    whole, worst = pair.whole, max(pair.blocks, key=lambda one: one.score)
    sign = "+" if whole.cosine >= 0 else "-"
    score = f"{sign}{whole.score:.2f}" if whole.score >= 0.005 else "0"
    words = ("hardly", "somewhat", "a lot")[(whole.score >= 0.1) + (whole.score >= 0.4)]
    yield f"{score:<6}{words:<9}{pair.first} with {pair.second}, most in {worst.block} ({worst.score:.2f})"
    figures = [f"cosine {whole.cosine:+.2f}", *([f"norms 1 : {whole.ratio:.2g}"] if whole.ratio else [])]
    overlaps = {"same inputs": whole.rows, "same outputs": whole.columns, "opposite signs": whole.sign_conflict}
    figures += [f"{what} {share:.0%}" for what, share in overlaps.items() if share is not None]
    yield f"               {', '.join(figures)}"


def learnt_text(names: Sequence[str], learnt: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """What the coefficients brought each adapter."""
    for name, before, after in zip(names, learnt["before"], learnt["after"], strict=True):
        yield f"learned     {name} is {after:.0%} off its own effect; in a plain sum, it would be {before:.0%} off"
