"""A sweep over the layouts of a saved model, with real ranks: the first tokens of transformers, and errors before anything starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpbench.models.weights import token_ids
from cpbench.reading import read

transformers = pytest.importorskip("transformers", reason="the oracle of the model tests: pip install 'cpbench[hf]'")
tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (61, 37)


def sweep(folder, *arguments):
    command = [sys.executable, "-m", "cpbench", "sweep", "--set", "device=cpu", "--set", "timing.max_samples=3", "--weights", "model", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=200, check=False)


def test_a_sweep_reads_the_weights_and_finds_the_first_tokens_of_transformers(tmp_path):
    torch.manual_seed(1)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
        expected = [int(model(part[None]).logits[0, -1].argmax()) for part in token_ids(5, LENGTHS, 258).split(list(LENGTHS))]
    lengths = ["--lengths", ",".join(map(str, LENGTHS)), "--seed", "5"]
    done = sweep(tmp_path, *lengths, "--layouts", "cp1,cp2,tp2,pp2", "--strategy", "ring", "-o", "r.json")
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "r.json")
    assert [cell.status for cell in result.cells] == ["ok"] * 4
    for cell in result.cells:
        assert [token.token for token in cell.first_tokens] == expected, cell.id
        assert cell.key["model"] == "model" and cell.key["layers"] == 3
        assert cell.key["options"]["weights"].startswith("model@") and str(tmp_path) not in cell.id
    assert "weights model@" in done.stdout


def test_a_truncated_checkpoint_is_refused_before_anything_starts(tmp_path):
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = sweep(tmp_path, "--seq", "64", "-q")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 2)
    assert lines[0].startswith("error: The data of tensor model.") and lines[0].endswith("it is truncated.") and lines[1].startswith("hint:  ")
    assert not list(tmp_path.glob("results/*"))


def test_a_prompt_is_read_with_the_tokenizer_and_the_table_says_how_it_goes_on(tmp_path):
    words = [f"w{number}" for number in range(258)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    text = [7 * number % 251 for number in range(70)]
    (tmp_path / "prompt.txt").write_text(" ".join(words[token] for token in text))
    with torch.no_grad():
        expected = int(model(torch.tensor([[1, *text]])).logits[0, -1].argmax())
    done = sweep(tmp_path, "--prompt", "prompt.txt", "--cp", "2", "--strategy", "ring", "-o", "r.json")
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "r.json")
    assert [(cell.status, cell.key["lengths"], len(cell.key["options"]["prompt"])) for cell in result.cells] == [("ok", [71], 12)] * 2
    assert [[(first.token, first.text) for first in cell.first_tokens] for cell in result.cells] == [[(expected, words[expected])]] * 2
    assert f'The prompt goes on with "{words[expected]}" (token {expected}).' in done.stdout
    assert "prompt.txt" not in json.dumps([cell.key for cell in result.cells])
