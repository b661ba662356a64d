"""Log-probabilities of every layout against one rank and fp64, rounding points, padded vocabularies, and who has which token."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpbench import logprobs
from cpbench.against import Job, Runner, collected
from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.errors import CpbenchError
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.logprob_record import LogProbs, json_schema, read_log_probs, write_log_probs
from cpbench.logprobs import NO_TOKEN, ROUNDINGS, Rule, log_probs, rank_log_probs, successors
from cpbench.models.presets import PRESETS
from cpbench.models.weights import token_ids
from cpbench.plan import unsupported
from cpbench.program import Program, alone

CPU, KERNEL = torch.device("cpu"), load_kernel("cpu_flash")
LENGTHS, PREFIXES = (101, 67, 130), (0, 40, 17)
CONFIG = replace(PRESETS["qwen3-tiny"], vocab=512)
LAYOUTS = ["tp2", "tp4", "cp2", "cp2tp2", "tp2sp", "pp2", "dp2", "dp2cp2tp2sp", "pp2tp2"]


def make(layout="cp1", dtype="float32", **options):
    layout = Layout.parse(layout)
    strategy, partition = ("none", "contiguous") if layout.cp == 1 else ("allgather", "zigzag")
    fields = {"lengths": LENGTHS, "prefixes": PREFIXES} | options
    cell = Cell("prefill", CONFIG, 2, layout, strategy, partition, "auto", dtype, "cpu", **fields)
    assert unsupported(cell) is None
    return cell


def samples_of(cell, rule=Rule()):  # noqa: B008 - frozen
    return Runner(Job(cell), rule).record().tensors()


def truth_of(cell, temperature=1.0):
    """In fp64, from the hidden states of one rank: norm, head and log-softmax written out, the whole prompt at once."""
    single = make(dtype="float64", lengths=cell.lengths, prefixes=cell.prefixes)
    program = Program(single, alone(), load_kernel("reference"), CPU, rounded_to=torch.float32)
    with torch.inference_mode():
        x_NM = program.run().rows
        x_NM = x_NM / (x_NM.square().mean(1, keepdim=True) + CONFIG.norm_eps).sqrt() * program.decoder.final_norm
        logits_NV = x_NM @ program.decoder.head.T / temperature
        probs_NV = logits_NV - logits_NV.exp().sum(1, keepdim=True).log()
    ids, start, samples = token_ids(cell.seed, cell.lengths, CONFIG.vocab), 0, []
    for length in cell.lengths:
        samples.append(torch.tensor([probs_NV[start + i, ids[start + i + 1]] for i in range(length - 1)], dtype=torch.float64))
        start += length
    return samples


@pytest.fixture(scope="module")
def truth():
    return truth_of(make())


@pytest.mark.parametrize("options", [{}, {"chunk": 48}], ids=["whole", "chunks"])
@pytest.mark.parametrize("layout", ["cp1", *LAYOUTS])
def test_every_layout_has_the_log_probabilities_of_fp64_at_the_same_positions(layout, options, truth):
    found = samples_of(make(layout, **options))
    assert [len(sample) for sample in found] == [length - 1 for length in LENGTHS]
    for sample, right in zip(found, truth, strict=True):
        assert sample.dtype == torch.float32
        torch.testing.assert_close(sample.double(), right, rtol=0, atol=2e-5)
    assert float(torch.cat(truth).std()) > 0.1, "positions could be told apart"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_bf16_a_layout_is_as_far_off_as_one_rank(layout, truth):
    rounding, error = (
        torch.cat([sample.double() - right for sample, right in zip(samples_of(make(name, "bfloat16")), truth, strict=True)]).norm() for name in ("cp1", layout)
    )
    assert 0 < error < 2 * rounding


def test_a_short_sequence_switches_context_parallelism_off_and_one_token_has_no_log_probability():
    cell = make("cp2", lengths=(64, 3, 1), prefixes=())
    found = samples_of(cell)
    assert cell.cp_off and [len(sample) for sample in found] == [63, 2, 0]
    for sample, right in zip(found, truth_of(cell), strict=True):
        torch.testing.assert_close(sample.double(), right, rtol=0, atol=2e-5)


def test_tensor_parallel_ranks_all_have_them_and_only_the_last_stage():
    cell = make("pp2tp2sp")
    world = LocalWorld(4, 60)

    def rank_program(rank):
        program = Program(cell, local_groups(cell.layout, world, rank), KERNEL, CPU)
        return rank_log_probs(program, program.run().rows, Rule())

    found = world.run(rank_program)
    assert [len(tokens) for tokens, _ in found] == [0, 0, 298, 298]
    assert torch.equal(found[2][1].nan_to_num(), found[3][1].nan_to_num())
    assert int(found[2][1].isnan().sum()) == len(LENGTHS)


def test_only_a_block_of_rows_has_logits(monkeypatch):
    whole, seen = samples_of(make("tp2")), []
    monkeypatch.setattr(logprobs, "BLOCK_BYTES", 4 * CONFIG.vocab * 7)
    monkeypatch.setattr(logprobs, "log_probs", lambda logits, *rest: seen.append(tuple(logits.shape)) or log_probs(logits, *rest))
    torch.testing.assert_close(torch.cat(samples_of(make("tp2"))), torch.cat(whole), rtol=0, atol=1e-5)
    assert sorted(seen) == [(4, 512)] * 2 + [(7, 512)] * 84


def test_successors():
    ids = torch.tensor([5, 6, 7, 8, 9, 4])
    assert successors(ids, (3, 1, 2)).tolist() == [6, 7, NO_TOKEN, NO_TOKEN, 4, NO_TOKEN]
    assert ids.tolist() == [5, 6, 7, 8, 9, 4]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_columns_that_pad_the_vocabulary_change_nothing(rounding):
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, rule = torch.tensor([0, 99, 3, 50, 7, 98]), Rule(0.7, rounding)
    padded = torch.cat([logits, torch.full((6, 28), 1e4, dtype=torch.bfloat16)], 1)
    alone_100 = log_probs(logits, tokens, 100, rule)
    assert torch.equal(log_probs(padded, tokens, 100, rule), alone_100)
    assert not torch.equal(log_probs(padded, tokens, 128, rule), alone_100), "kept, they would have"


def test_a_vocabulary_that_is_wider_than_the_logits():
    with pytest.raises(ValueError, match="a vocabulary of 101 in logits of 100 columns"):
        log_probs(torch.zeros(1, 100), torch.zeros(1, dtype=torch.int64), 101, Rule())


def test_rounding_points():
    """Trainer: nothing is rounded between bf16 logits and fp32. Rollout: scaled logits and the result are bf16 values."""
    logits = (4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))).bfloat16()
    tokens = torch.arange(50) * 5
    exact = torch.log_softmax(logits.double() / 0.7, 1).gather(1, tokens[:, None])[:, 0]
    trainer, rollout = (log_probs(logits, tokens, 300, Rule(0.7, name)) for name in ("trainer-fp32", "rollout"))
    torch.testing.assert_close(trainer.double(), exact, rtol=3e-7, atol=0)
    assert not torch.equal(trainer, trainer.bfloat16().float())
    scaled = (logits.double() / 0.7).bfloat16()
    expected = torch.log_softmax(scaled.double(), 1).gather(1, tokens[:, None])[:, 0].bfloat16()
    assert torch.equal(rollout, expected.float())
    unscaled = torch.log_softmax(logits.double() / 0.7, 1).bfloat16().gather(1, tokens[:, None])[:, 0]
    assert not torch.equal(rollout, unscaled.float()), "scaled logits are rounded too"


def test_the_temperature_divides_logits():
    found, right = samples_of(make(), Rule(2.5)), truth_of(make(), 2.5)
    torch.testing.assert_close(torch.cat(found).double(), torch.cat(right), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("temperature", "nearest"), [("0", "0.01"), ("-1", "0.01"), ("101", "100"), ("nan", "0.01"), ("inf", "100")])
def test_temperatures_that_cannot_be(temperature, nearest):
    with pytest.raises(CpbenchError, match="is not possible") as raised:
        Rule.parse(temperature, None)
    assert raised.value.hint == f"The nearest valid value is {nearest}."


def test_rules_from_text():
    assert Rule.parse(None, None) == Rule(1.0, "trainer-fp32")
    assert Rule.parse("0.7", "rollout") == Rule(0.7, "rollout")
    with pytest.raises(CpbenchError, match="'hot' is not a temperature"):
        Rule.parse("hot", None)
    with pytest.raises(CpbenchError, match="Unknown rounding 'rolout'"):
        Rule.parse(None, "rolout")


def test_ranks_that_do_not_agree_are_an_error():
    cell = make(lengths=(3,), prefixes=())
    tokens, values = torch.arange(3), torch.tensor([-1.0, -2.0, float("nan")])
    assert [sample.tolist() for sample in collected(cell, [(tokens, values), (tokens[1:], values[1:])])] == [[-1.0, -2.0]]
    with pytest.raises(CpbenchError, match="Ranks 0 and 2 of cp1 do not have the same log-probability behind token 1") as raised:
        collected(cell, [(tokens, values), (tokens[:1], values[:1]), (tokens[1:2], values[1:2] + 1e-6)])
    assert raised.value.exit_code == 1


def test_a_file_keeps_every_bit_and_not_finite_values_as_null(tmp_path):
    cell, ids = make(lengths=(5, 2), prefixes=()), torch.arange(7)
    samples = [torch.tensor([-1 / 3, -0.1, float("nan"), -1e-30]), torch.tensor([-float("inf")])]
    write_log_probs(LogProbs.of(cell, ids, Rule(), samples), tmp_path / "a.json")
    back = read_log_probs(tmp_path / "a.json")
    first, second = back.tensors()
    assert torch.equal(first.nan_to_num(7), samples[0].nan_to_num(7)) and first.isnan().tolist() == [False, False, True, False]
    assert second.isnan().all() and back.samples[1] == [None]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_the_committed_schema_is_current():
    committed = json.loads((Path(__file__).parents[2] / "results" / "logprobs.schema.json").read_text())
    assert committed == json.loads(json.dumps(json_schema())), "regenerate it: python -m cpbench.logprob_record > results/logprobs.schema.json"
