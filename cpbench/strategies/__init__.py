"""Attention across context-parallel ranks: one file per algorithm, one line here each."""

from __future__ import annotations

from cpbench.strategies.allgather import AllGather
from cpbench.strategies.base import Strategy
from cpbench.strategies.external import RingFlashAttn, TransformerEngine, YunchangUlysses
from cpbench.strategies.local_map import LocalMap
from cpbench.strategies.none import NoParallelism
from cpbench.strategies.pass_q import PassQ
from cpbench.strategies.ring import Ring
from cpbench.strategies.torch_cp import ALL_GATHER, ALL_TO_ALL, TorchContextParallel
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
        TorchContextParallel("torch-cp", ALL_GATHER, "one all-gather"),
        TorchContextParallel("torch-cp-ring", ALL_TO_ALL, "an all-to-all per step"),
        LocalMap(),
        RingFlashAttn(),
        YunchangUlysses(),
        TransformerEngine("te-p2p", "p2p", "K and V passed on around a ring"),
        TransformerEngine("te-all-gather", "all_gather", "K and V gathered"),
        TransformerEngine("te-a2a", "a2a", "all-to-all over heads"),
    )
}
