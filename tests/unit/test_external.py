"""Strategies of other libraries: what is refused and why, and the adapters against stand-ins that know how each library lays out its rows.

That the comparison can fail is tested too: mistakes that an adapter could make are put into it one by one.
"""

import sys
from dataclasses import replace

import pytest
import torch

from cpbench.buffers import Buffers
from cpbench.cell import Cell
from cpbench.distributed.local import LocalGroup, LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.formulas import score_pairs
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.strategies import STRATEGIES, external, library
from cpbench.strategies.base import Context, row_index
from cpbench.strategies.library import LibraryPlan, as_batch, as_rows
from tests.unit.external_stand_in import StandIn

SCALE = 0.3  # not what a library would take by itself
HEADS, KV_HEADS, DIM = 8, 4, 16
CONFIG = ModelConfig("test", 64, 1, HEADS, KV_HEADS, DIM, 64, 64)
EXTERNAL = [name for name, strategy in STRATEGIES.items() if isinstance(strategy, external.ExternalStrategy)]
LIBRARIES = [name for name, strategy in STRATEGIES.items() if strategy.brings_collectives]
CASES = [(name, (64,)) for name in EXTERNAL] + [(name, (64, 64, 64)) for name in EXTERNAL if name != "yunchang-ulysses"] + [("ring-flash-attn", (32, 96, 16))]


def make(name, lengths=(64,), cp=2, device="cuda", dtype="bfloat16", **options):
    return Cell("attention", CONFIG, 1, Layout(cp=cp), name, STRATEGIES[name].partitions[0], "auto", dtype, device, tuple(lengths), **options)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(LocalGroup, "process_group", property(lambda group: group))
    monkeypatch.setattr(torch.cuda, "Stream", object)
    yield StandIn(monkeypatch)
    external._yunchang.cache_clear()
    external._transformer_engine.cache_clear()


def error(name, lengths, cp=2):
    """Relative error of a strategy's answer on all ranks against one device in fp64, on fp32 inputs."""
    cell, strategy = make(name, lengths, cp), STRATEGIES[name]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(cell.tokens, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    world = LocalWorld(cp)

    def open_rows(rows):
        return tuple(x.unflatten(1, (KV_HEADS, DIM)) for x in rows.chunk(2, 1))

    def program(rank):
        tokens = row_index(cell.split.tokens(rank), q.device)
        context = Context(local_groups(cell.layout, world, rank), load_kernel("cpu_flash"), Buffers(), None, SCALE, cell.shape)
        rows = torch.cat([k[tokens].flatten(1), v[tokens].flatten(1)], 1)
        return tokens, strategy.attend(q[tokens], rows, open_rows, strategy.plan(cell, rank), context, 0)

    out = torch.full_like(q, float("nan"))
    for tokens, mine in world.run(program):
        out[tokens] = mine
    reference, at, truth = load_kernel("reference"), 0, []
    for length in lengths:
        truth.append(reference.block(*(x[at : at + length].double() for x in (q, k, v)), SCALE, True)[0])
        at += length
    truth = torch.cat(truth)
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize(("name", "lengths"), CASES, ids=str)
def test_adapters_hand_over_rows_and_arguments_as_the_library_lays_them_out(name, lengths, cp, stand_in):
    assert STRATEGIES[name].check(make(name, lengths, cp)) is None
    assert error(name, lengths, cp) < 1e-6
    assert len(stand_in.calls) == cp


def test_each_way_to_communicate_and_each_batch_takes_its_function(stand_in):
    for name, lengths in CASES:
        error(name, lengths)
    functions = ["zigzag_ring_flash_attn_func", "zigzag_ring_flash_attn_varlen_func", "UlyssesAttention"]
    assert set(stand_in.calls) == {*functions, *(f"DotProductAttention {comm}" for comm in ("p2p", "all_gather", "a2a"))}


def swapped_k_and_v(monkeypatch):
    for strategy in (external.RingFlashAttn, external.YunchangUlysses, external.TransformerEngine):
        call = strategy.call
        monkeypatch.setattr(strategy, "call", lambda self, q, k, v, context, call=call: call(self, q, v, k, context))
    packed = external.RingFlashAttn._attend_packed
    monkeypatch.setattr(external.RingFlashAttn, "_attend_packed", lambda self, q, k, v, plan, context: packed(self, q, v, k, plan, context))


def heads_before_rows(monkeypatch):
    monkeypatch.setattr(library, "as_batch", lambda x, plan: as_batch(x, plan).transpose(1, 2))
    monkeypatch.setattr(external, "packed_order", lambda lengths: list(range(sum(lengths)))[::-1])


def no_scale(monkeypatch):
    for strategy in (external.RingFlashAttn, library.LibraryStrategy):
        attend = strategy.attend

        def without(self, q, rows, open_rows, plan, context, layer, attend=attend):
            return attend(self, q, rows, open_rows, plan, replace(context, scale=None), layer)

        monkeypatch.setattr(strategy, "attend", without)


def rows_as_they_lie(monkeypatch):
    monkeypatch.setattr(library, "as_batch", lambda x, plan: x.unflatten(0, (plan.sequences, -1)))
    monkeypatch.setattr(library, "as_rows", lambda x, plan: x.flatten(0, 1))
    monkeypatch.setattr(external, "packed_order", lambda lengths: list(range(sum(lengths))))


def output_left_in_batch_order(monkeypatch):
    monkeypatch.setattr(library, "as_rows", lambda x, plan: x.flatten(0, 1))
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda self, dim, index, source: self.copy_(source))


@pytest.mark.parametrize("mistake", [swapped_k_and_v, heads_before_rows, no_scale])
@pytest.mark.parametrize(("name", "lengths"), CASES, ids=str)
def test_a_mistake_in_an_adapter_is_noticed(name, lengths, mistake, stand_in, monkeypatch):
    mistake(monkeypatch)
    assert noticed(name, lengths)


@pytest.mark.parametrize("mistake", [rows_as_they_lie, output_left_in_batch_order])
@pytest.mark.parametrize(("name", "lengths"), [case for case in CASES if len(case[1]) > 1], ids=str)
def test_a_mistake_in_the_order_of_sequences_is_noticed(name, lengths, mistake, stand_in, monkeypatch):
    mistake(monkeypatch)
    assert noticed(name, lengths)


def noticed(name, lengths):
    """Another answer, or a refusal by the stand-in."""
    try:
        return not error(name, lengths) < 1e-3
    except (AssertionError, RuntimeError):
        return True


def test_rows_become_batches_and_rows_again():
    rows = torch.tensor([0, 1, 10, 11, 2, 3, 12, 13]).view(8, 1, 1)  # two sequences of four local rows, early blocks first
    plan = LibraryPlan(2, 2, (4, 4))
    batch = as_batch(rows, plan)
    assert batch.flatten(1).tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert torch.equal(as_rows(batch, plan), rows)
    one = torch.arange(8).view(8, 1, 1)
    assert as_batch(one, LibraryPlan(1, 2, (8,))).data_ptr() == one.data_ptr(), "one sequence is not copied"
    assert external.packed_order((4, 2)) == [0, 1, 3, 4, 2, 5]


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_strategies_say_why_they_cannot_run(name, stand_in, monkeypatch):
    strategy = STRATEGIES[name]
    assert strategy.check(make(name, device="cpu")) == f"{name} cannot run here: it runs on cuda, not on cpu; use ring or ulysses"
    assert "it takes bfloat16 and float16, not float32; use bfloat16" in strategy.check(make(name, dtype="float32"))
    monkeypatch.setattr(library, "find_spec", lambda module: None)
    reason = strategy.check(make(name))
    assert "not installed; install" in reason and "pip install" in reason and strategy.modules[0] in reason


@pytest.mark.parametrize("name", LIBRARIES)
def test_batches_that_a_library_cannot_take_are_refused_with_the_nearest_one(name, stand_in):
    def reason(**options):
        return STRATEGIES[name].check(make(name, **options))

    multiple = 4 if make(name).partition == "zigzag" else 2
    assert reason() is None
    assert "use ring, or prefix=0" in reason(prefixes=(5,))
    assert "leave the chunk out" in reason(chunk=32)
    assert f"{multiple} divides, not 63; the nearest valid length is 64" in reason(lengths=(63,))
    assert f"the nearest valid length is {multiple}" in reason(lengths=(1,))
    uneven = reason(lengths=(64, 32))
    assert uneven is None if name == "ring-flash-attn" else "use ring, or 2 of 64" in uneven or "batch=1" in uneven
    assert "use usp or the layout cp4" in STRATEGIES[name].check(replace(make(name, cp=4), layout=Layout(cp=4, ulysses=2)))


def test_heads_that_a_library_cannot_exchange_are_refused(stand_in):
    for name in ("yunchang-ulysses", "te-a2a"):
        assert "kv heads that divide over cp=8, not 4; the nearest degree is cp=4" in STRATEGIES[name].check(make(name, cp=8))
    assert STRATEGIES["te-p2p"].check(make("te-p2p", cp=8)) is None


def test_every_library_does_the_whole_causal_triangle():
    for name in LIBRARIES:
        cell = make(name, (64,), cp=4)
        assert sum(score_pairs(cell, rank) for rank in range(4)) == HEADS * 64 * 65 // 2, name


def test_ring_flash_attn_is_imported_without_the_adapter_that_a_newer_transformers_breaks(tmp_path, monkeypatch):
    package = tmp_path / "ring_flash_attn"
    (package / "adapters").mkdir(parents=True)
    (package / "__init__.py").write_text("from .adapters import substitute_hf_flash_attn, update_ring_flash_attn_params\nanswer = 42\n")
    (package / "adapters" / "__init__.py").write_text("raise ImportError(\"cannot import name 'x' from 'transformers'\")\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ring_flash_attn", "ring_flash_attn.adapters"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert external.import_ring_flash_attn().answer == 42
    for name in ("ring_flash_attn", "ring_flash_attn.adapters"):
        del sys.modules[name]
    (package / "__init__.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        external.import_ring_flash_attn()


def test_process_group_is_none_on_the_local_backend():
    assert local_groups(Layout(cp=2), LocalWorld(2), 0).cp.process_group is None
