"""Where two layouts part: planted faults are found where they are, and hashes of rows tell bits apart."""

from dataclasses import replace

import pytest
import torch

from cpbench.against import Job, Runner, compare
from cpbench.communicator import Communicator
from cpbench.divergence import modules, row_hashes
from cpbench.layout import Layout
from cpbench.logprobs import Rule
from cpbench.models.held import Models
from cpbench.models.weights import token_ids

from .test_logprobs import CONFIG, LENGTHS, make

LAYERS = 4
OF_A_LAYER = {
    "input norm": lambda layer: layer.input_norm,
    "attention": lambda layer: layer.attention.o_weight[0],
    "feed-forward norm": lambda layer: layer.mlp_norm,
    "feed-forward": lambda layer: layer.mlp.down_weight[0],
}
AROUND = {
    "embedding": lambda decoder: decoder.embedding[token_ids(0, LENGTHS, CONFIG.vocab)[107]],
    "final norm": lambda decoder: decoder.final_norm,
    "logits": lambda decoder: decoder.head[0],
}


def traced(one="cp1", other="cp1", **options):
    cells = [replace(make(layout, **options), layers=LAYERS) for layout in (one, other)]
    return compare(*(Runner(Job(cell), Rule()) for cell in cells), trace=True)


def plant(monkeypatch, layout, weight_of):
    """Move the largest value of a weight by one ulp, on one layout, where a rank has it: sums may round a smaller one away for every token."""
    get, planted = Models.get, set()

    def faulty(self, cell, random, part):
        decoder = get(self, cell, random, part)
        weight = weight_of(decoder) if cell.layout == Layout.parse(layout) and id(decoder) not in planted else None
        if weight is not None:
            largest = weight.abs().argmax()
            weight[largest] = torch.nextafter(weight[largest], torch.tensor(9.0))
            planted.add(id(decoder))
        return decoder

    monkeypatch.setattr(Models, "get", faulty)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("module", OF_A_LAYER)
def test_a_weight_that_is_one_ulp_off_is_found_in_its_layer(module, layer, monkeypatch):
    plant(monkeypatch, "pp2", lambda decoder: next((OF_A_LAYER[module](one) for one in decoder.layers if one.index == layer), None))
    found = traced("cp1", "pp2")
    assert found.divergence.module == f"layer {layer}, {module}"
    assert 0 < found.divergence.relative_rmse < 1e-6 and 0 < found.divergence.max_error < 1e-5
    assert 0 < len(found.divergence.tokens) <= sum(LENGTHS)


@pytest.mark.parametrize("module", AROUND)
def test_and_around_the_layers(module, monkeypatch):
    plant(monkeypatch, "cp1", AROUND[module])
    assert traced("pp2", "cp1").divergence.module == module


def test_an_embedding_that_is_off_concerns_the_tokens_that_have_it(monkeypatch):
    plant(monkeypatch, "cp1", AROUND["embedding"])
    ids = token_ids(0, LENGTHS, CONFIG.vocab)
    assert traced("pp2", "cp1").divergence.tokens == tuple((ids == ids[107]).nonzero().flatten().tolist())


@pytest.mark.parametrize("layout", ["tp2sp", "pp2tp2"])
def test_layouts_that_only_move_rows_do_not_part(layout):
    found = traced("tp2", layout)
    assert found.divergence is None and found.agreement.identical


def test_context_parallelism_parts_in_attention_for_tokens_that_merge_or_tile_otherwise():
    found = traced("cp1", "cp2", dtype="bfloat16")
    assert found.divergence.module == "layer 0, attention"
    assert not found.agreement.identical


def test_a_copy_on_one_rank_is_enough(monkeypatch):
    """The second tensor-parallel rank alone has a wrong sum. Its logits are a part of what all ranks gather, so that their log-probabilities agree."""
    complete = Communicator.complete

    def wrong(self, partial):
        out = complete(self, partial)
        if self._tp.rank == 1 and self._tp.size == 2 and self._groups.layout.pp == 1 and len(out):
            out[5, 0] += 1
        return out

    monkeypatch.setattr(Communicator, "complete", wrong)
    found = traced("pp2tp2", "tp2")
    assert (found.divergence.module, found.divergence.tokens) == ("embedding", (5,))
    assert found.divergence.max_error == pytest.approx(1)


def test_modules_are_those_of_a_pass_in_its_order():
    cell = make("cp1")
    _, (trace,) = Runner(Job(cell), Rule()).traced()
    seen = list(trace.hashes)
    assert seen == modules(cell)
    assert seen[:4] == ["embedding", "layer 0, input norm", "layer 0, attention", "layer 0, residual after attention"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hashes_tell_bits_and_places_apart(dtype):
    rows = torch.randn(8, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, before = row_hashes(rows), rows.clone()
    assert torch.equal(rows, before), "rows are only looked at"
    assert len(set(plain.tolist())) == 8
    assert torch.equal(row_hashes(rows[2:5]), plain[2:5]), "whatever rows are beside it"
    swapped = rows.clone()
    swapped[0, [3, 4]] = rows[0, [4, 3]]
    one_bit = rows.clone()
    one_bit[1, 32] = torch.nextafter(rows[1, 32].float(), torch.tensor(9.0)) if dtype == torch.float32 else rows[1, 32] * (1 + torch.finfo(dtype).eps)
    zero = torch.zeros(1, 33, dtype=dtype)
    assert (row_hashes(swapped) != plain).tolist() == [True] + [False] * 7
    assert (row_hashes(one_bit) != plain).tolist() == [False, True] + [False] * 6
    assert not torch.equal(row_hashes(zero), row_hashes(-zero))


def test_hashes_of_many_rows_come_in_blocks(monkeypatch):
    rows = torch.randn(50, 16)
    plain = row_hashes(rows)
    monkeypatch.setattr("cpbench.divergence.BLOCK_ELEMENTS", 64)
    assert torch.equal(row_hashes(rows), plain)
