"""RoPE belongs to tokens: under Ulysses, what a rank attends with is rotated as in the unsplit sequence, whatever strategy another layer has.

Every rank rotates the tokens that it holds by their positions. What arrives after the exchange must be, bit for bit, the heads of a rotation of
all tokens on one device. Whether the attention to it is right is tested in test_strategies.py.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.kernels.cpu_flash import CpuFlash
from cpbench.models.config import ModelConfig
from cpbench.models.rope import cos_sin, rotate
from cpbench.program import Program
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import ParallelAttention, keys_and_values
from cpbench.strategies.ulysses import head_shards
from tests.unit.test_strategies import CPU, TINY, error, make, truth

HEADS, KV_HEADS, DIM, THETA = 8, 2, 32, 1e4
CONFIG = ModelConfig("test", 64, 1, HEADS, KV_HEADS, DIM, 64, 64)
COMBINATIONS = [(name, partition) for name in ("ulysses", "ulysses-gather") for partition in STRATEGIES[name].partitions]
BATCHES = {"one sequence": ((301,), (0,)), "packed, with prefixes": ((101, 67, 40), (7, 0, 90))}


class Recording(CpuFlash):
    """Keeps the queries and keys of its latest plan."""

    def attend(self, q_THD, k_SGD, v_SGE, segments, scale, into):
        self.q, self.k = q_THD.clone(), k_SGD.clone()
        super().attend(q_THD, k_SGD, v_SGE, segments, scale, into)


class Rotated(Program):
    """Attention alone, whose queries and new keys this rank rotates by the positions of its tokens."""

    def attention_inputs(self):
        q, rows = super().attention_inputs()
        cos, sin = cos_sin(torch.cat([step.positions for step in self.steps]), DIM, THETA)
        rotated, k = rows.clone(), keys_and_values(DIM)
        rotate(k(rows)[0], cos, sin, k(rotated)[0])
        return rotate(q, cos, sin, torch.empty_like(q)), rotated


def attended(cell):
    """The queries and keys that each rank attends with: those of the cached prefix first."""
    world = LocalWorld(cell.world_size)

    def program(rank):
        kernel = Recording()
        Rotated(cell, local_groups(cell.layout, world, rank), kernel, CPU).run()
        return kernel.q, kernel.k

    return world.run(program)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
def test_what_arrives_is_the_rotation_of_the_unsplit_sequence_bit_for_bit(name, partition, batch, cp):
    lengths, prefixes = batch
    ((q, k),) = attended(make(lengths=lengths, prefixes=prefixes, config=CONFIG))
    shards = head_shards(HEADS, KV_HEADS, cp)
    ranks = attended(make(name, partition, lengths, CONFIG, prefixes=prefixes, cp=cp))
    assert len(ranks) == cp
    for rank, (mine_q, mine_k) in enumerate(ranks):
        assert torch.equal(mine_q, q[:, rank * shards.q_heads : (rank + 1) * shards.q_heads])
        assert torch.equal(mine_k, k[:, list(shards.kv_sources[rank])])


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_unsplit_means_from_the_end_of_each_prefix_on(batch):
    """The other side of the comparison, with positions written out."""
    lengths, prefixes = batch
    cell = make(lengths=lengths, prefixes=prefixes, config=CONFIG)
    plain, _ = Program(cell, local_groups(cell.layout, LocalWorld(1), 0), CpuFlash(), CPU).attention_inputs()
    positions = torch.cat([torch.arange(prefix, prefix + length) for length, prefix in zip(lengths, prefixes, strict=True)])
    ((q, _),) = attended(cell)
    assert torch.equal(q, rotate(plain, *cos_sin(positions, DIM, THETA), torch.empty_like(plain)))
    assert not torch.equal(q, plain)


@dataclass(frozen=True)
class LayerByLayer:
    """A parallel attention for each layer of a model, in the place of one."""

    of: tuple[ParallelAttention, ...]

    def rows(self, layer, shape, like):
        return self.of[layer].rows(layer, shape, like)

    def attend(self, q_THD, rows_nW, open_rows, layer):
        return self.of[layer].attend(q_THD, rows_nW, open_rows, layer)


@pytest.mark.parametrize("partition", ["contiguous", "zigzag"])
@pytest.mark.parametrize("names", [("ulysses", "ring"), ("ring", "ulysses"), ("ulysses", "allgather", "ulysses", "pass-q")], ids="-".join)
def test_each_layer_keeps_its_own_strategy_and_all_give_the_answer_of_one_device(names, partition):
    """A prefill of as many layers as strategies, all over the same partition, at cp=4."""
    cell = make(names[0], partition, (75, 33), target="prefill", layers=len(names), cp=4)
    world = LocalWorld(cell.world_size)

    def program(rank):
        program = Program(cell, local_groups(cell.layout, world, rank), CpuFlash(), CPU)
        (step,) = program.steps
        own = [ParallelAttention(STRATEGIES[name], STRATEGIES[name].plan(replace(cell, strategy=name), rank), step.attention.context) for name in names]
        program.steps[0] = replace(step, attention=LayerByLayer(tuple(own)))
        return program.tokens, program.run()

    rows = torch.empty(cell.tokens, TINY.hidden)
    outputs = world.run(program)
    for tokens, output in outputs:
        rows[tokens] = output.rows
    expected = truth(cell)
    assert error(rows, expected.rows) < 5e-6
    assert outputs[0][1].first.tokens == expected.first.tokens
