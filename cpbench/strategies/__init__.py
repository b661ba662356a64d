"""Attention across context-parallel ranks: one file per algorithm, one line here each."""

from __future__ import annotations

from cpbench.strategies.allgather import AllGather
from cpbench.strategies.base import Strategy
from cpbench.strategies.none import NoParallelism
from cpbench.strategies.pass_q import PassQ
from cpbench.strategies.ring import Ring
from cpbench.strategies.ulysses import Ulysses
from cpbench.strategies.ulysses_gather import UlyssesGather
from cpbench.strategies.usp import Usp

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        NoParallelism(),
        AllGather(),
        Ring(),
        Ulysses(),
        UlyssesGather(),
        Usp(),
        PassQ(),
    )
}
