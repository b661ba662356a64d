"""`cpbench verify --against` and `-o`: two layouts or stored files, exit codes, JSON, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cpbench.against
from cpbench.against import Comparison
from cpbench.agreement import agreement
from cpbench.cell import Cell
from cpbench.divergence import Divergence
from cpbench.layout import Layout
from cpbench.logprob_record import LogProbs
from cpbench.logprobs import Rule
from cpbench.models.presets import PRESETS
from cpbench.models.weights import token_ids

from .conftest import Cpbench, Golden

SMALL = ("--lengths", "12,5", "-q")
ROWS = ("--layouts", "tp2sp", "--against", "tp2", "-q")  # which only moves rows
PARTS = ("--strategy", "ring", "--cp", "2", "--against", "cp1", "--dtype", "bfloat16", "-q")  # which merges what one rank sums at once


def record(layout: str, samples: list[list[float]], rule: Rule) -> LogProbs:
    strategy = "none" if layout == "cp1" else "ring"
    lengths = tuple(len(sample) + 1 for sample in samples)
    cell = Cell("prefill", PRESETS["qwen3-tiny"], 2, Layout.parse(layout), strategy, "zigzag", "auto", "bfloat16", "cpu", lengths, prefixes=(0, 17))
    return LogProbs.of(cell, token_ids(0, lengths, 512), rule, [torch.tensor(sample) for sample in samples])


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that is known: two tokens of the second sample differ, and the first module that does is in layer 1."""
    one = record("cp1", [[-1.0] * 20, [-2.0] * 20], Rule(0.7, "rollout"))
    other = record("cp2", [[-1.0] * 20, [*[-2.0] * 17, -2.25, -2.0, -1.75]], Rule(0.7, "trainer-fp32"))
    parted = Divergence("layer 1, attention", (3, 21, 22, 24, 26, 28, 30, 32, 34, 40), 2.5e-3, 0.125)
    made = Comparison(one, other, agreement(one.tensors(), other.tensors()), parted)
    monkeypatch.setattr(cpbench.against, "compare", lambda one, other, trace: made if trace else replace(made, divergence=None))


def test_what_is_printed(planted: None, cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("verify", *PARTS, "--trace-divergence")
    assert (ran.code, ran.err) == (1, "")
    golden("verify_against", ran.out)


def test_json(planted: None, cpbench_command: Cpbench) -> None:
    data = json.loads(cpbench_command("verify", *PARTS, "--trace-divergence", "--json").out)
    assert (data["schema"], data["identical"], data["checked"], data["different"]) == ("cpbench.agreement", False, 40, 2)
    assert (data["max_delta"], data["avg_delta"], data["diff_mean"], data["diff_max"]) == (0.25, 0.025, 0.0, 0.25)
    assert (data["one"]["key"]["layout"], data["other"]["key"]["layout"], data["one"]["rounding"]) == ("cp1", "cp2", "rollout")
    assert data["divergence"]["module"] == "layer 1, attention" and data["divergence"]["tokens"][:2] == [3, 21]


def test_layouts_that_only_move_rows_are_identical(cpbench_command: Cpbench) -> None:
    ran = cpbench_command("verify", *ROWS, "--trace-divergence")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[:2] == ["tp2sp against tp2", "2 layers of qwen3-tiny, 101+67@40+130@17, float32, trainer-fp32, temperature 1"]
    assert "Bitwise identical : True" in lines and "Tokens checked    : 295" in lines
    assert lines[-1].startswith("no module differs: ")


def test_layouts_that_round_otherwise_give_exit_code_1(cpbench_command: Cpbench) -> None:
    ran = cpbench_command("verify", *PARTS, "--trace-divergence")
    assert ran.code == 1
    assert "Bitwise identical : False" in ran.out and "first difference: layer 0, attention, " in ran.out
    plain = cpbench_command("verify", *PARTS[:-1])
    assert plain.code == 1 and "first difference" not in plain.out
    assert [line.split(":")[0] for line in plain.err.splitlines()] == ["cp2 ring zigzag", "cp1 none contiguous"]


def test_one_rank_is_the_default_on_the_other_side(cpbench_command: Cpbench) -> None:
    assert cpbench_command("verify", "--against", "pp2", *SMALL).out.startswith("cp1 against pp2\n")


def test_layers_are_those_that_stages_need(cpbench_command: Cpbench) -> None:
    assert cpbench_command("verify", "--against", "pp4", *SMALL).out.startswith("cp1 against pp4\n4 layers of qwen3-tiny")
    assert cpbench_command("verify", "--against", "pp2", "--set", "layers=3", *SMALL).out.startswith("cp1 against pp2\n3 layers of")


def test_files_are_compared_with_layouts_and_files(cpbench_command: Cpbench, tmp_path: Path) -> None:
    ran = cpbench_command("verify", "--layouts", "pp2", *SMALL, "-o", "a.json")
    assert (ran.code, ran.out) == (0, "pp2: 15 log-probabilities of 2 layers of qwen3-tiny, 12+5, float32, trainer-fp32, temperature 1\n")
    stored = json.loads((tmp_path / "a.json").read_text())
    assert (stored["schema"], stored["key"]["layout"], stored["key"]["seed"], stored["key"]["lengths"]) == ("cpbench.logprobs", "pp2", 0, [12, 5])
    assert [len(sample) for sample in stored["samples"]] == [11, 4]
    for arguments in (["a.json", "--against", "cp1", *SMALL], ["--against", "a.json", *SMALL], ["a.json", "--against", "a.json", "-q"]):
        assert cpbench_command("verify", *arguments).code == 0, arguments
    stored["samples"][1][2] -= 0.5
    (tmp_path / "b.json").write_text(json.dumps(stored))
    ran = cpbench_command("verify", "b.json", "--against", "a.json")
    assert (ran.code, ran.err) == (1, "")
    assert "Tokens different  : 1\nMax delta         : 5.000000e-01\nAvg delta         : 1.250000e-01\n" in ran.out


def test_what_is_compared_is_stored_too(cpbench_command: Cpbench, tmp_path: Path) -> None:
    ran = cpbench_command("verify", "--layouts", "pp2", "--against", "cp1", *SMALL, "-o", "a.json", "--temperature", "0.5", "--rounding", "rollout")
    assert ran.code == 0
    stored = json.loads((tmp_path / "a.json").read_text())
    assert (stored["key"]["layout"], stored["temperature"], stored["rounding"]) == ("pp2", 0.5, "rollout")


def test_stored_as_json_and_printed_as_json_are_one(cpbench_command: Cpbench, tmp_path: Path) -> None:
    ran = cpbench_command("verify", *SMALL, "-o", "a.json", "--json")
    assert json.loads(ran.out) == json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize(
    ("other", "message", "hint"),
    [
        (["--lengths", "12,6"], "prompts cannot be compared: [12, 6] and [12, 5] new tokens.", "--lengths"),
        (["--prefix", "3"], "prompts cannot be compared: [3, 3] and [] cached tokens.", "--prefix"),
        (["--seed", "1"], "models cannot be compared: seed 1 and seed 0.", "--seed"),
        (["--set", "layers=1"], "models cannot be compared: layers 1 and layers 2.", "--set layers"),
        (["--model", "qwen3-moe-tiny"], "models cannot be compared: model qwen3-moe-tiny and model qwen3-tiny.", "--model"),
        (["--temperature", "2"], "temperatures cannot be compared: 2 and 1.", "--temperature 1"),
    ],
)
def test_what_cannot_be_compared(other: list[str], message: str, hint: str, cpbench_command: Cpbench) -> None:
    assert cpbench_command("verify", *SMALL, "-o", "a.json").code == 0
    lengths = () if "--lengths" in other else SMALL[:2]
    assert cpbench_command("verify", "-q", *lengths, *other, "-o", "b.json").code == 0
    ran = cpbench_command("verify", "b.json", "--against", "a.json")
    error, told = ran.err.splitlines()
    assert (ran.code, ran.out, error) == (3, "", f"error: Log-probabilities of different {message}")
    assert told.startswith("hint:  Run both with ") and hint in told


def test_other_tokens_are_another_prompt(cpbench_command: Cpbench, tmp_path: Path) -> None:
    cpbench_command("verify", *SMALL, "-o", "a.json")
    stored = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(stored | {"prompt": "0123456789ab"}))
    ran = cpbench_command("verify", "b.json", "--against", "a.json")
    assert ran.code == 3 and "prompts cannot be compared: tokens 0123456789ab and " in ran.err


DAMAGED = {
    "not JSON": ("{", "is not a complete JSON file"),
    "another schema": ({"schema": "cpbench.result"}, "is not a cpbench logprobs"),
    "a later version": ({"schema_version": 2}, "has schema version 2"),
    "a field that is missing": ({"key": {}}, "breaks the logprobs schema at key.target"),
    "too few samples": ({"samples": []}, "the samples are not as long as the sequences"),
    "a number that is none": ({"temperature": "hot"}, "breaks the logprobs schema at temperature"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_are_damaged(name: str, cpbench_command: Cpbench, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    good = json.loads(record("cp1", [[-1.0], [-2.0]], Rule()).model_dump_json(by_alias=True))
    (tmp_path / "a.json").write_text(damage if isinstance(damage, str) else json.dumps(good | damage))
    ran = cpbench_command("verify", "a.json", "--against", "cp1")
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (4, "", 2)
    assert message in ran.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("--temperature 0 --against cp2", "A temperature of 0 is not possible", "0.01"),
        ("--temperature warm --against cp2", "'warm' is not a temperature.", "0.7"),
        ("--rounding rolout --against cp2", "Unknown rounding 'rolout'.", "'rollout'"),
        ("--temperature 2", "--temperature is for log-probabilities", "--against"),
        ("--rounding rollout", "--rounding is for log-probabilities", "--against"),
        ("--trace-divergence --cp 2", "--trace-divergence is for log-probabilities", "--against"),
        ("--trace-divergence -o c.json", "--trace-divergence looks into two layouts", "--against cp1"),
        ("--trace-divergence --against stored.json", "--trace-divergence looks into two layouts", "--against cp1"),
        ("stored.json", "stored.json is to be compared", "--against LAYOUT"),
        ("stored.json --against cp2 -o c.json", "-o stores what is run, and stored.json is stored.", "Leave -o out"),
        ("stored.json --against cp2 --layouts tp2", "--layouts would change nothing", "Leave --layouts out"),
        ("stored.json --against cp2 --set dp=2", "--set dp would change nothing", "Leave --set dp out"),
        ("--against tp2 --strategy ring", "--strategy is for context-parallel layouts", "--layouts cp2"),
        ("stored.json --against stored.json --lengths 9", "--lengths would change nothing", "Leave --lengths out"),
        ("stored.json --against stored.json --temperature 1", "--temperature would change nothing", "Leave --temperature out"),
        ("stored.json --against stored.json --set layers=1", "--set layers would change nothing", "Leave --set layers out"),
        ("-o stored.json", "stored.json exists.", "-o"),
        ("-o nowhere/a.json --lengths 3", "nowhere/a.json cannot be written: No such file or directory.", "-o"),
        ("--deep --against cp2", "--deep is for the grid", "Leave --deep out"),
        ("--cp 2,4 --against cp1", "of one layout, strategy and batch, not of 2", "cp2 allgather"),
        ("--cp 2 --strategy ring,allgather --against cp1", "not of 2", "cp2 ring"),
        ("--against cp3 --strategy ulysses", "do not divide over cp=3", "cp=2"),
        ("--against tp3", "tp3 cannot run", "tp2"),
        ("--against pp9", "pp9 cannot run", "pp4"),
        ("--against cp128", "128 ranks", "Sweeps"),
        ("--against spiral", "'spiral' is not a layout", "cp4tp2"),
        ("--against cp2 --strategy torch-cp --lengths 64", "needs processes", "sweep"),
        ("--against cp2 --set target=layer", "Unknown field of log-probabilities 'target'.", "Valid"),
        ("--against cp2 --lengths 1 --layouts cp1 --strategy ulysses-gather", "cp=2 is above the 1 new token", "cp1"),
        ("--against tp2 --lengths 1", "There are no log-probabilities", "at least 2 tokens"),
    ],
)
def test_bad_input(arguments: str, message: str, hint: str, cpbench_command: Cpbench, tmp_path: Path) -> None:
    (tmp_path / "stored.json").write_text("{}")
    ran = cpbench_command("verify", *arguments.split(), "-q")
    error, told = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert error.startswith("error: ") and message in error
    assert told.startswith("hint:  ") and hint in told


def test_a_checkpoint_and_a_text(cpbench_command: Cpbench, tmp_path: Path) -> None:
    """The log-probabilities of transformers, for a text in the checkpoint's tokens."""
    transformers = pytest.importorskip("transformers", reason="the oracle of the model tests: pip install 'cpbench[hf]'")
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=16)).eval()
    model.save_pretrained(tmp_path / "model")
    words = {f"w{number}": number for number in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    ids = [(7 * number + 3) % 64 for number in range(40)]
    (tmp_path / "text.txt").write_text(" ".join(f"w{token}" for token in ids))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    right = torch.log_softmax(logits / 0.7, 1)[range(39), ids[1:]]
    for layout in ("tp2", "pp3"):
        options = ("--layouts", layout, "--set", "weights=model", "--set", "prompt=text.txt", "--temperature", "0.7", "-o", f"{layout}.json", "-q")
        assert cpbench_command("verify", *options).code == 0
        stored = json.loads((tmp_path / f"{layout}.json").read_text())
        torch.testing.assert_close(torch.tensor(stored["samples"][0], dtype=torch.float64), right, rtol=0, atol=1e-5)
        assert stored["key"]["layers"] == 3 and stored["key"]["options"]["weights"].startswith("model@")
    assert cpbench_command("verify", "tp2.json", "--against", "pp3.json", "-q").code in (0, 1)
