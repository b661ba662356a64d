"""Checkpoints: slices of their tensors, what names them, and a refusal by name of everything that is not the model."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpbench.cell import Cell
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.layout import Layout
from cpbench.models.checkpoint import BLOCK, INDEX, SCALE, SINGLE, Checkpoint
from cpbench.models.decoder import Slice
from cpbench.models.held import Models
from cpbench.models.hugging_face import from_hugging_face
from cpbench.models.parameters import parameters
from cpbench.models.weights import CheckpointWeights, RandomWeights
from cpbench.numerics import small_cell
from cpbench.plan import make_plan
from cpbench.scenario import parse_scenario, resolve
from tests.unit.test_saved_models import saved

transformers = pytest.importorskip("transformers", reason="the oracle of the model tests: pip install 'cpbench[hf]'")
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in one file that a test may spoil."""
    saved("qwen3-tied", tmp_path)
    return tmp_path


def test_every_slice_is_that_of_the_whole_tensor_and_a_copy(folder):
    whole = load_file(folder / SINGLE)
    weights = CheckpointWeights(Checkpoint.open(folder), torch.float32, CPU)
    name = "model.layers.1.mlp.down_proj.weight"
    for rows, columns in [(None, None), (range(3, 31), None), (None, range(7, 8)), (range(63, 64), range(83))]:
        part = whole[name][rows.start if rows else 0 : rows.stop if rows else None, columns.start if columns else 0 : columns.stop if columns else None]
        read = weights.linear(name, (64, 84), rows, columns)
        assert torch.equal(read, part)
        assert read.untyped_storage().nbytes() == 4 * read.numel(), "a view keeps the whole file in memory"
    assert torch.equal(weights.norm("model.norm.weight", 64), whole["model.norm.weight"])


def test_values_are_converted_once_and_rounded_where_the_reference_asks_for_it(folder):
    whole = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(CheckpointWeights(checkpoint, torch.bfloat16, CPU).linear("model.embed_tokens.weight", (300, 64)), whole.bfloat16())
    reference = CheckpointWeights(checkpoint, torch.float64, CPU, torch.bfloat16).linear("model.embed_tokens.weight", (300, 64))
    assert torch.equal(reference, whole.bfloat16().double())


def test_weights_are_equal_where_their_values_are(folder):
    one, other = (CheckpointWeights(Checkpoint.open(folder), torch.float32, CPU) for _ in range(2))
    one.norm("model.norm.weight", 64)
    assert one == other and hash(one) == hash(other)
    assert one != replace(other, dtype=torch.bfloat16)
    tensors = load_file(folder / SINGLE)
    save_file(tensors, folder / SINGLE)
    name = Checkpoint.open(folder).name
    assert name.startswith(f"{folder.name}@") and str(folder.parent) not in name
    save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1}, folder / SINGLE)
    assert Checkpoint.open(folder).name != name, "the same header, but other values"


def test_blocks_of_fp8_are_scaled_slice_by_slice(tmp_path):
    torch.manual_seed(0)
    shape, name = (300, 270), "model.layers.0.mlp.up_proj.weight"
    stored = (torch.randn(shape) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3) + 0.1
    save_file({name: stored, name + SCALE: scales}, tmp_path / SINGLE)
    whole = stored.float() * scales.repeat_interleave(BLOCK, 0)[:300].repeat_interleave(BLOCK, 1)[:, :270]
    weights = CheckpointWeights(Checkpoint.open(tmp_path), torch.float32, CPU)
    for rows, columns in [
        (range(300), range(270)),
        (range(127, 129), range(1, 2)),
        (range(130, 250), range(100, 257)),
        (range(256, 300), range(255, 270)),
    ]:
        assert torch.equal(weights.linear(name, shape, rows, columns), whole[rows.start : rows.stop, columns.start : columns.stop])


def test_an_fp8_checkpoint_is_the_model_that_its_scales_make_of_it(folder):
    """Quantised here as DeepSeek's are, and compared with the weights that come of it in fp32."""
    tensors, plain = load_file(folder / SINGLE), folder / "plain"
    quantised, exact = {}, {}
    for name, value in tensors.items():
        if value.dim() == 2 and "embed" not in name:
            rows, columns = (-(-size // BLOCK) for size in value.shape)
            scales = torch.stack([torch.stack([part.abs().max() / 448 for part in row.split(BLOCK, 1)]) for row in value.split(BLOCK)])
            assert scales.shape == (rows, columns)
            spread = scales.repeat_interleave(BLOCK, 0)[: value.shape[0]].repeat_interleave(BLOCK, 1)[:, : value.shape[1]]
            quantised[name], quantised[name + SCALE] = (value / spread).to(torch.float8_e4m3fn), scales
            exact[name] = quantised[name].float() * spread
        else:
            quantised[name] = exact[name] = value
    plain.mkdir()
    save_file(exact, plain / SINGLE)
    save_file(quantised, folder / SINGLE)
    checkpoint, config = Checkpoint.open(folder), from_hugging_face(folder)
    checkpoint.require(config, config.layers)
    for name, shape in parameters(config, config.layers):
        if len(shape) == 2:
            ours, theirs = (CheckpointWeights(opened, torch.float32, CPU).linear(name, shape) for opened in (checkpoint, Checkpoint.open(plain)))
            assert torch.equal(ours, theirs), name
    save_file({name: value for name, value in quantised.items() if name != "model.layers.0.mlp.up_proj.weight" + SCALE}, folder / SINGLE)
    refused(folder, r"The scales model\.layers\.0\.mlp\.up_proj\.weight_scale_inv of the FP8 tensor in model\.safetensors: is missing")


def refused(folder, message, layers=None):
    """The checkpoint of a folder is refused in one sentence, with a hint."""
    with pytest.raises(CpbenchError, match=message) as caught:
        config = from_hugging_face(folder)
        Checkpoint.open(folder).require(config, layers or config.layers)
    assert caught.value.exit_code == 2 and caught.value.hint
    return caught.value


def changed(folder, edit):
    """Rewrite the tensors of a checkpoint."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def test_tensors_that_are_missing_surplus_or_of_another_shape_are_named(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = load_file(folder / SINGLE)
    changed(folder, lambda tensors: tensors.pop(name))
    refused(folder, rf"Tensor {name} is not in model\.safetensors")
    save_file(whole | {name: whole[name][:5].contiguous()}, folder / SINGLE)
    refused(folder, rf"Tensor {name} in model\.safetensors is \[5, 64\]; config\.json makes it \[10, 64\]")
    save_file(whole | {"model.layers.1.self_attn.k_proj.bias": torch.zeros(10)}, folder / SINGLE)
    error = refused(folder, r"model\.safetensors holds tensor model\.layers\.1\.self_attn\.k_proj\.bias, which")
    assert name in error.hint
    save_file(whole | {"model.layers.2.input_layernorm.weight": torch.zeros(64)}, folder / SINGLE)
    refused(folder, r"holds tensor model\.layers\.2\.input_layernorm\.weight, which")
    save_file(whole | {name: whole[name].int()}, folder / SINGLE)
    refused(folder, rf"Tensor {name} in model\.safetensors has the dtype I32")


def test_what_old_checkpoints_store_and_layers_that_do_not_run_are_no_reason_to_refuse(folder):
    config = from_hugging_face(folder)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5), "lm_head.weight": torch.zeros(300, 64)}
    changed(folder, lambda tensors: tensors.update(extra))
    Checkpoint.open(folder).require(config, 1)
    changed(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    Checkpoint.open(folder).require(config, 1)
    assert refused(folder, "has 2 layers, not 3", layers=3).hint == "The nearest valid value is --layers 2."


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("num_hidden_layers", 5, "model.layers.2"), ("vocab_size", 301, "embed_tokens"), ("num_hidden_layers", 60_000, "model.layers.2")],
)
def test_a_config_that_contradicts_its_tensors_is_refused(folder, field, value, message):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {field: value, "layer_types": None}))
    refused(folder, message)


def header(folder, edit, cut=0):
    """Rewrite the header of the file, or cut bytes off its end."""
    file = folder / SINGLE
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = edit(data[8 : 8 + size])
    rest = data[8 + size :]
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest[: len(rest) - cut])


def entry(**changes):
    def edit(text):
        value = json.loads(text)
        value["model.norm.weight"] |= changes
        return json.dumps(value).encode()

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / SINGLE).write_bytes(b""), "truncated, or no safetensors file: it is 0 bytes long"),
        (lambda folder: (folder / SINGLE).write_bytes(b"PK\x03\x04" * 100), "truncated, or no safetensors file: its header claims"),
        (lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "its header claims 9,223,372,036,854,775,808 bytes"),
        (lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", 4) + b"nope"), "The header of model.safetensors is not JSON"),
        (lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", 8) + "{}".encode("utf-32-le")), "The header of model.safetensors is not JSON"),
        (lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", 2) + b"[]"), "holds no JSON object"),
        (lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", 9**5) + b"[" * 9**5), "is not JSON"),
        (lambda folder: header(folder, lambda text: text, cut=1), "it is truncated"),
        (lambda folder: header(folder, entry(data_offsets=[0, 10**12])), "tensor model.norm.weight in model.safetensors lie at 0 to 1,000,000,000,000"),
        (lambda folder: header(folder, entry(data_offsets=[-4, 8])), "The header entry of tensor model.norm.weight in model.safetensors"),
        (lambda folder: header(folder, entry(data_offsets="x")), "The header entry of tensor model.norm.weight in model.safetensors"),
        (lambda folder: header(folder, entry(shape=[65])), r"bytes of tensor model.norm.weight in model.safetensors are not those of F32 \[65\]"),
        (lambda folder: header(folder, entry(shape=[True])), "The header entry of tensor model.norm.weight"),
        (lambda folder: header(folder, entry(shape=[10**400] * 9)), "The header entry of tensor model.norm.weight"),
        (lambda folder: header(folder, entry(shape=[1] * 17)), "The header entry of tensor model.norm.weight"),
        (lambda folder: header(folder, entry(data_offsets=[0, 256])), "begin at"),
        (lambda folder: (folder / SINGLE).unlink(), r"holds no \*\.safetensors"),
        (lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"), r"holds pickled weights \(pytorch_model\.bin\)"),
    ],
)
def test_files_that_are_truncated_foreign_or_pickled_are_refused(folder, spoil, message):
    spoil(folder)
    refused(folder, message)


def test_bytes_behind_the_last_tensor_are_refused(folder):
    with (folder / SINGLE).open("ab") as file:
        file.write(b"0" * 12)
    refused(folder, "model.safetensors has 12 bytes behind its last tensor")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.norm.weight": "model-2.safetensors"}, r"names model-2\.safetensors \(tensor model\.norm\.weight\), which is not in"),
        (
            {"model.norm.weight": "../model.safetensors"},
            r"places tensor model\.norm\.weight in '\.\./model\.safetensors', which is no safetensors file beside it",
        ),
        ({"model.norm.weight": "config.json"}, "which is no safetensors file beside it"),
        ({"model.norm.weight": "a" * 5000 + ".safetensors"}, "which is no safetensors file beside it"),
        ({"model.norm.weight": 3}, "has no weight_map"),
        ({"model.absent": "a.safetensors"}, r"places tensor model\.absent in a\.safetensors, which does not hold it"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(folder, weight_map, message):
    (folder / SINGLE).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, message)


def test_a_tensor_in_two_files_needs_an_index(folder):
    (folder / SINGLE).rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "b.safetensors")
    refused(folder, r"Tensor model\.norm\.weight is in a\.safetensors and in b\.safetensors")
    placed = {name: "a.safetensors" for name, _ in parameters(from_hugging_face(folder), 2)} | {"extra": "b.safetensors"}
    save_file({"model.norm.weight": torch.zeros(64), "extra": torch.zeros(1)}, folder / "b.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    assert {name: stored.file for name, stored in Checkpoint.open(folder).tensors.items()} == placed


def test_headers_and_indexes_have_a_size_limit(folder, monkeypatch):
    monkeypatch.setattr("cpbench.models.checkpoint.MAX_JSON_BYTES", 200)
    refused(folder, "its header claims")
    (folder / SINGLE).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}, "metadata": " " * 200}))
    refused(folder, "larger than 200 bytes")


def test_decoders_of_a_checkpoint_are_kept_and_one_that_has_changed_is_not_read(folder):
    config, models = from_hugging_face(folder), Models(str(folder))
    cell = Cell("prefill", config, 2, Layout(), "none", "contiguous", "auto", "float32", "cpu", (9,), weights=Checkpoint.open(folder).name)
    random = RandomWeights(0, torch.float32, CPU)
    decoder = models.get(cell, random, Slice.of(cell, 0))
    assert models.get(replace(cell, lengths=(8,), seed=2), replace(random, seed=2), Slice.of(cell, 0)) is decoder
    assert models.get(replace(cell, weights=None), random, Slice.of(cell, 0)) is not decoder
    changed(folder, lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    with pytest.raises(RuntimeError, match="by now, not"):
        Models(str(folder)).get(cell, random, Slice.of(cell, 0))


def test_projections_of_a_checkpoint_are_quantised_after_they_are_read(folder):
    """Slice by slice as it is read, other weights not at all, and the reference never."""
    config, name = from_hugging_face(folder), "model.layers.0.self_attn.o_proj.weight"
    cell = Cell("prefill", config, 2, Layout(), "none", "contiguous", "auto", "float32", "cpu", (9,), weights=Checkpoint.open(folder).name, quant="fp8")
    random, models, part = RandomWeights(0, torch.float32, CPU, quant="fp8"), Models(str(folder)), Slice.of(cell, 0)
    decoder = models.get(cell, random, part)
    stored, held = load_file(folder / SINGLE), decoder.layers[0].attention.o_weight
    scale = stored[name].float().abs().amax(1) / 448
    assert held.values.dtype == torch.float8_e4m3fn and torch.equal(held.scales, scale)
    assert torch.equal(held.values.float(), (stored[name].float() / scale[:, None]).to(torch.float8_e4m3fn).float())
    assert torch.equal(decoder.embedding, stored["model.embed_tokens.weight"].float())
    assert models.get(cell, replace(random, quant="none"), part) is not decoder
    reference = models.get(cell, RandomWeights(0, torch.float64, CPU, torch.float32, "fp8"), part)
    assert torch.equal(reference.layers[0].attention.o_weight, stored[name].double())


def test_a_cell_says_which_weights_and_not_where_they_lie(folder):
    machine = Machine("cpu", 0, 2, 8 << 30, "Example CPU")
    fields = {"weights": str(folder), "seq": [64], "cp": [2], "strategies": ["ring"], "device": "cpu"}
    scenario, notes = resolve(parse_scenario(fields), machine)
    cells = [planned.cell for planned in make_plan(scenario, machine).cells]
    assert [cell.key["options"]["weights"] for cell in cells] == [Checkpoint.open(folder).name] * 2
    assert str(folder.parent) not in json.dumps([cell.key for cell in cells]) + "".join(cell.id for cell in cells)
    assert [Cell.from_dict(cell.to_dict()) for cell in cells] == cells
    assert {(cell.layers, cell.config.layers) for cell in cells} == {(2, 2)} and "layers 2 of 2 (all of the checkpoint)" in notes
    assert resolve(scenario, machine)[0] == scenario == parse_scenario(scenario.model_dump())
    assert small_cell(cells[0]).weights is None, "the check runs on a reduced width, which no checkpoint fits"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "qwen3-tiny"}, "model and weights both say"),
        ({"target": "attention"}, "has no weights to read"),
        ({"prompt": "p.txt"}, "seq and prompt both describe the batch"),
        ({"prompt": "p.txt", "weights": None, "seq": None}, "prompt is for a prefill with the weights of a checkpoint"),
        ({"prompt": "p.txt", "seq": None}, "p.txt cannot be read: No such file"),
        ({"prompt": __file__, "seq": None}, "holds no tokenizer.json"),
        ({"layers": 3}, "has 2 layers, not 3"),
        ({"weights": "nowhere"}, "nowhere/config.json cannot be read"),
        ({"weights": "qwen3-tiny"}, "qwen3-tiny/config.json cannot be read"),
    ],
)
def test_scenarios_that_no_checkpoint_fits_are_refused(folder, fields, message):
    machine = Machine("cpu", 0, 2, 8 << 30, "Example CPU")
    with pytest.raises(CpbenchError, match=message) as caught:
        make_plan(resolve(parse_scenario({"weights": str(folder), "seq": [64], **fields}), machine)[0], machine)
    assert caught.value.exit_code == 2


def test_headers_are_checked_without_torch(folder):
    code = f"""
import sys
from cpbench.models.checkpoint import Checkpoint
from cpbench.models.hugging_face import from_hugging_face
Checkpoint.open({str(folder)!r}).require(from_hugging_face({str(folder)!r}), 2)
assert not {{"torch", "safetensors", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
