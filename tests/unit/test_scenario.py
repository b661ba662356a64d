"""Scenarios: what is accepted, which sentence a mistake gets, what the machine fills in, and the committed JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.defaults import model_of
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.scenario import Scenario, json_schema, load_scenario, override, parse_scenario, resolve, without_replaced

SCENARIOS = Path(__file__).parents[2] / "scenarios"
CPU = Machine("cpu", 0, 2, 8 << 30, "a CPU")
CUDA = Machine("cuda", 4, 32, 64 << 30, "a CPU", ("a GPU",) * 4, 80 << 30, "1.0")


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "case.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refused(call: object, *arguments: object) -> CpbenchError:
    with pytest.raises(CpbenchError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint
    return caught.value


def test_sizes_durations_and_lists_read_as_people_write_them() -> None:
    scenario = parse_scenario({"seq": "36k,1M, 1000", "cp": 2, "batch": ["3"], "timing": {"precision": "1%"}, "limits": {"budget": "20m"}})
    assert scenario.seq == [36_864, 1_048_576, 1000]
    assert scenario.cp == [2] and scenario.batch == [3]
    assert scenario.timing.precision == 0.01 and scenario.limits.budget == 1200.0


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"seq": "36q"}, "seq: '36q' has the unknown suffix 'q'.", "36k = 36,864"),
        ({"cp": 0}, "cp: 0 is not possible: it must be at least 1.", "nearest valid value is 1"),
        ({"cp": [2, 5000]}, "cp: 5000 is not possible: it must be at most 1024.", "1024"),
        ({"cp": "2,x"}, "cp: 'x' is not a whole number.", "whole number"),
        ({"cp": True}, "cp: True is not a whole number.", "number"),
        ({"layers": True}, "layers: True is not a whole number.", "number"),
        ({"seq": []}, "seq: the list is empty.", "at least one"),
        ({"sq": 1}, "Unknown scenario field 'sq'.", "Did you mean 'seq'?"),
        ({"timing": {"precison": 1}}, "Unknown scenario field 'timing.precison'.", "Did you mean 'timing.precision'?"),
        ({"target": "prefil"}, "Unknown target 'prefil'.", "Did you mean 'prefill'?"),
        ({"timing": {"precision": "200%"}}, "timing.precision: '200%' is outside 0% to 100%.", "2%"),
        ({"timing": {"min_samples": 50}}, "timing: max_samples = 30 is below min_samples = 50.", "at least 50"),
        ({"limits": {"cell_timeout": "3y"}}, "limits.cell_timeout: '3y' has the unknown unit 'y'.", "90s"),
        ({"limits": {"budget": 0}}, "limits.budget: 0 is not possible: it must be more than 0.", "more than"),
        ({"rounds": 2.5}, "rounds: '2.5' is not a whole number.", "whole number"),
        ({"name": "../x"}, "name: '../x' is not a file name.", "letters"),
        ({"strategies": [3]}, "strategies: '3' is not text.", "text"),
        ({"timing": 3}, "timing: '3' is not a group of fields.", "group"),
        ({"seq": "0"}, "seq: 0 is not possible: it must be at least 1.", "nearest valid value is 1"),
        ({"seq": -3}, "seq: -3 is not possible: it must be at least 1.", "nearest valid value is 1"),
        ({"prefix": "-1k"}, "prefix: '-1k' is not a length.", "whole number"),
        ({"prefix": "0,-1"}, "prefix: -1 is not possible: it must be at least 0.", "nearest valid value is 0"),
        ({"batches": [{"lengths": "0,5"}]}, "batches.lengths: 0 is not possible: it must be at least 1.", "nearest valid value is 1"),
        ({"batches": [{"lengths": "5,6,7", "prefixes": "1,2"}]}, "batches: 3 lengths and 2 prefixes do not pair up.", "for example 1,2,0"),
        ({"batches": [{"lengths": "5", "prefixes": "1k,2"}]}, "batches: 1 length and 2 prefixes do not pair up.", "for example 1k,"),
        ({"batches": [{"lengths": []}]}, "batches.lengths: the list is empty.", "at least one"),
        ({"batches": [{"lengths": 1, "prefix": 3}]}, "Unknown scenario field 'batches.prefix'.", "Did you mean 'batches.prefixes'?"),
        ({"batches": [{"prefixes": 3}]}, "batches.lengths is missing.", "value"),
        ({"batches": []}, "batches: the list is empty.", "at least one"),
        ({"batches": [{"lengths": "1"}], "seq": 1}, "seq and batches (--lengths) both describe batches.", "Leave seq out"),
        ({"batches": [{"lengths": "1"}], "batch": 2}, "batch and batches (--lengths) both describe batches.", "Leave batch out"),
        ({"seq": "1,2", "cp": "2,4,8", "pair": True}, "Lists of different lengths do not pair up: seq has 2 values, cp has 3 values.", "Give each 3 values"),
        ({"chunk": "8k", "kv_cache": "drop"}, "chunk needs the K/V cache: each chunk reads what the ones before it left.", "kv_cache=keep"),
        ({"page_size": 0}, "page_size: 0 is not possible: it must be at least 1.", "nearest valid value is 1"),
        ({"dp": 0}, "dp: 0 is not possible: it must be at least 1.", "nearest valid value is 1"),
        ({"gpus": "8,0"}, "gpus: 0 is not possible: it must be at least 1.", "nearest valid value is 1"),
        ({"gpus": 2000}, "gpus: 2000 is not possible: it must be at most 1024.", "1024"),
        ({"layouts": "cp2,xx"}, "layouts: 'xx' is not a layout.", "cp4tp2"),
        ({"layouts": ["tp8/ep3"]}, "layouts: tp8 has 8 ranks, and the expert axes /ep3 are 3 ranks.", "tp8/ep4tp2"),
        ({"layouts": 8}, "layouts: '8' is not text.", "text"),
        ({"layouts": ","}, "layouts: the list is empty.", "at least one"),
        ({"layouts": "tp2", "tp": 2}, "layouts and tp both say which layouts to measure.", "Leave layouts or tp out"),
        ({"gpus": 8, "ep": 2}, "gpus and ep both say which layouts to measure.", "Leave gpus or ep out"),
        ({"gpus": 8, "layouts": "tp8"}, "layouts and gpus both say which layouts to measure.", "Leave layouts or gpus out"),
        ({"dp": "1,2", "pp": "1,2,4", "pair": True}, "Lists of different lengths do not pair up: dp has 2 values, pp has 3 values.", "Give each 3 values"),
        ({"head_groups": 0}, "head_groups: 0 is not possible: it must be at least 1.", "nearest valid value is 1"),
    ],
)
def test_a_wrong_field_is_named_with_the_nearest_valid_value(data: dict[str, object], message: str, hint: str) -> None:
    error = refused(parse_scenario, data)
    assert error.message == message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seq: [36k", "is not YAML"),
        ("seq: &a [1]\ncp: *a", "aliases are not allowed"),
        ("seq: 1\nseq: 2", "given twice"),
        ("a: " + "[" * 50 + "]" * 50, "nested"),
        ("[" * 100_000, "not YAML"),
        ("- 36k", "does not hold fields and values"),
        ("36", "does not hold fields and values"),
        ("", "does not hold fields and values"),
        ("name: !!python/object/apply:os.system [true]", "not YAML"),
        ("seq: 2024-99-99", "not YAML"),
        ("seq: !!int 5", "tags such as"),
        ('name: "\\UFFFFFFFF"', "not YAML"),
        ("seq: 0x" + "f" * 5000, "has 5002 characters"),
        ("seq: " + "1:" * 200 + "1.5", "has 403 characters"),
        ("seq: [" + "1," * 6000 + "1]", "more than 5000 values"),
        ("{" + "a," * 100_000 + "a}", "more than 5000 values"),
        (b"\xff\xfe\x00", "not text"),
        ("#" * 300_000, "larger than"),
    ],
)
def test_a_file_that_is_no_scenario_gets_one_sentence(tmp_path: Path, text: str | bytes, words: str) -> None:
    assert words in refused(load_scenario, write(tmp_path, text)).message


def test_a_missing_file_and_a_folder_get_one_sentence(tmp_path: Path) -> None:
    assert "No such file" in refused(load_scenario, tmp_path / "none.yaml").message
    assert "cannot be read" in refused(load_scenario, tmp_path).message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_scenario_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = write(tmp_path_factory.getbasetemp(), data)
    try:
        assert isinstance(load_scenario(file), Scenario)
    except CpbenchError as error:
        assert error.exit_code == 2


def test_the_file_names_the_scenario(tmp_path: Path) -> None:
    assert load_scenario(write(tmp_path, "seq: 1k")).name == "case"
    assert load_scenario(write(tmp_path, "name: other")).name == "other"


def test_override_sets_one_field_and_leaves_the_original_alone() -> None:
    data = {"seq": "1k", "timing": {"precision": 0.5}}
    assert override(data, "timing.precision=1%")["timing"]["precision"] == "1%"
    assert data["timing"] == {"precision": 0.5}
    assert override({}, "cp=[2, 4]") == {"cp": [2, 4]}
    assert override({}, "baseline=false") == {"baseline": False}
    assert parse_scenario(override({}, "limits.budget=20m")).limits.budget == 1200.0
    assert parse_scenario(override({"layers": 3}, "layers=null")).layers is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("timing.precison=1", "Unknown scenario field 'timing.precison'"),
        ("timing=1", "timing is a group of fields"),
        ("seq.x=1", "seq has no fields"),
        ("extends=smoke", "extends is for scenario files"),
        ("seq", "is not a setting"),
        ("=1", "is not a setting"),
        ("seq=[1", "is not a value"),
        ("seq=*a", "is not a value"),
    ],
)
def test_a_wrong_override_gets_one_sentence(setting: str, words: str) -> None:
    assert words in refused(override, {}, setting).message


def test_cpu_defaults_are_filled_and_every_choice_is_a_note() -> None:
    scenario, notes = resolve(parse_scenario({"seq": "36k", "cp": "2,4,8"}), CPU)
    assert (scenario.device, scenario.model, scenario.layers, scenario.dtype) == ("cpu", "qwen3-tiny", 1, "float32")
    assert scenario.strategies == ["allgather", "ring", "ulysses"]
    text = "\n".join(notes)
    for words in ("device cpu", "model qwen3-tiny (default on cpu)", "dtype float32", "layers 1 of 4", "seq 36k = 36,864 tokens", "cp=1 added"):
        assert words in text


def test_cuda_defaults() -> None:
    scenario, _ = resolve(Scenario(), CUDA)
    assert (scenario.device, scenario.model, scenario.layers, scenario.dtype) == ("cuda", "qwen3-8b", 4, "bfloat16")
    assert scenario.cp == [1] and scenario.page_size == 256


def test_batches_read_as_people_write_them_and_are_echoed() -> None:
    scenario, notes = resolve(parse_scenario({"batches": [{"lengths": "1003,517,36k", "prefixes": "32k"}], "chunk": "8k", "cp": 2}), CPU)
    assert scenario.batches is not None and scenario.seq is scenario.batch is scenario.prefix is None
    assert (scenario.batches[0].lengths, scenario.batches[0].prefixes) == ([1003, 517, 36864], [32768] * 3)
    assert "batch of 3: 1003@32k+517@32k+36k@32k = 38,384 tokens behind 98,304 cached" in notes
    assert "chunk 8k = 8,192 tokens of each sequence" in notes
    assert "prefix 32k = 32,768 cached tokens per sequence" in resolve(parse_scenario({"prefix": "32k"}), CPU)[1]


def test_flags_replace_the_batches_of_a_file() -> None:
    assert without_replaced({"seq": 1, "prefix": 2, "cp": 3}, {"batches": []}) == {"cp": 3}
    assert without_replaced({"batches": [], "cp": 3}, {"seq": "1k"}) == {"cp": 3}
    assert without_replaced({"seq": 1, "cp": 3}, {"cp": 4}) == {"seq": 1, "cp": 3}


def test_flags_replace_the_layouts_of_a_file() -> None:
    assert without_replaced({"cp": 3, "ep": 2, "seq": 1}, {"layouts": "tp2"}) == {"seq": 1}
    assert without_replaced({"layouts": "tp2", "gpus": 8, "seq": 1}, {"pp": 2}) == {"seq": 1}
    assert without_replaced({"layouts": "tp2"}, {"gpus": 2}) == {}
    assert without_replaced({"layouts": "tp2", "seq": 1}, {"layouts": "cp2", "seq": 2}) == {"layouts": "tp2", "seq": 1}
    assert without_replaced({"cp": 3, "tp": 2}, {"cp": 4}) == {"cp": 3, "tp": 2}


def test_layouts_have_their_canonical_names_and_no_degrees_beside_them() -> None:
    scenario, notes = resolve(parse_scenario({"layouts": "tp2cp4, tp2cp4/ep8, cp8u4"}), CPU)
    assert scenario.layouts == ["cp4tp2", "cp4tp2/ep8", "cp8u4"]
    assert scenario.cp is scenario.tp is scenario.dp is scenario.pp is scenario.ep is None
    assert not [note for note in notes if "cp" in note and "baseline" in note]
    assert resolve(parse_scenario({"cp": 2}), CPU)[0].ep == [1]


PIPELINE = "pp without --chunk: the batch is one micro-batch, so that the stages of a pipeline work one after the other"


@pytest.mark.parametrize(
    ("data", "machine", "layers", "note"),
    [
        ({"pp": "1,2"}, CPU, 2, "layers 2 of 4 (default: one per pipeline stage)"),
        ({"layouts": "cp2,pp3dp2"}, CPU, 3, "layers 3 of 4 (default: one per pipeline stage)"),
        ({"gpus": "8,2"}, CPU, 4, "layers 4 of 4 (default: one per pipeline stage)"),
        ({"pp": 4}, CUDA, 4, "layers 4 of 36 (default on cuda)"),
        ({"pp": 6}, CUDA, 6, "layers 6 of 36 (default: one per pipeline stage)"),
        ({"pp": 1, "cp": 8}, CPU, 1, "layers 1 of 4 (default on cpu)"),
    ],
)
def test_there_is_a_layer_for_every_stage(data: dict[str, object], machine: Machine, layers: int, note: str) -> None:
    scenario, notes = resolve(parse_scenario(data), machine)
    assert scenario.layers == layers and note in notes
    assert (PIPELINE in notes) == (data.get("pp") != 1)
    assert PIPELINE not in resolve(parse_scenario({**data, "chunk": "8k"}), machine)[1]
    assert PIPELINE not in resolve(parse_scenario({**data, "target": "layer"}), machine)[1]
    assert resolve(parse_scenario({**data, "layers": 1}), machine)[0].layers == 1


def test_all_strategies_are_named() -> None:
    scenario, notes = resolve(parse_scenario({"strategies": "u2r1,all", "cp": 2}), CPU)
    assert scenario.strategies is not None and scenario.strategies[:2] == ["u2r1", "allgather"] and "none" not in scenario.strategies
    assert f"strategies {', '.join(scenario.strategies)}" in notes


def test_what_was_asked_for_is_kept_and_is_no_note() -> None:
    asked = {"model": "llama3-8b", "layers": 2, "dtype": "bfloat16", "device": "cpu", "seq": 100, "cp": 2, "strategies": "ring", "baseline": False}
    scenario, notes = resolve(parse_scenario(asked | {"timing": {"min_samples": 5}}), CUDA)
    assert (scenario.model, scenario.layers, scenario.dtype, scenario.device) == ("llama3-8b", 2, "bfloat16", "cpu")
    assert notes == ["seq 100 tokens"]


BATCHES = {"batches": [{"lengths": [5, 6], "prefixes": 3}, {"lengths": "7"}], "strategies": "all", "cache_tokens": "1k"}


@pytest.mark.parametrize("data", [{}, {"target": "layer"}, {"seq": "8k", "cp": [2, 4], "rounds": 3}, BATCHES, {"layouts": "tp2cp4,pp2"}, {"gpus": 4}])
@pytest.mark.parametrize("machine", [CPU, CUDA])
def test_resolving_twice_changes_nothing(data: dict[str, object], machine: Machine) -> None:
    once, _ = resolve(parse_scenario(data), machine)
    assert resolve(once, machine)[0] == once
    stored = json.loads(json.dumps(once.model_dump(mode="json")))
    assert parse_scenario(stored) == once


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"strategies": "rng"}, "Unknown strategy 'rng'"),
        ({"model": "qwen3-tin"}, "Unknown model 'qwen3-tin'"),
        ({"partition": "zig"}, "Unknown partition 'zig'"),
        ({"kernel": "sdp"}, "Unknown kernel 'sdp'"),
        ({"layers": 9}, "qwen3-tiny has 4 layers, not 9"),
        ({"target": "layer", "layers": 2}, "Target 'layer' runs one layer"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_names_that_do_not_exist_are_found_before_anything_starts(data: dict[str, object], words: str) -> None:
    assert words in refused(resolve, parse_scenario(data), CPU).message


def test_the_committed_schema_is_the_generated_one() -> None:
    """Regenerate with: python -m cpbench.scenario > scenarios/schema.json"""
    assert json.loads((SCENARIOS / "schema.json").read_text()) == json_schema()


def test_a_model_with_fewer_experts_says_so_in_its_name_and_runs_up_to_a_sparse_layer() -> None:
    resolved, notes = resolve(parse_scenario({"model": "deepseek-v3", "experts": 16}), CPU)
    config = model_of(resolved)
    assert (config.name, config.experts.count, config.experts.top_k) == ("deepseek-v3-e16", 16, 8)
    assert resolved.layers == 4
    assert "layers 4 of 61 (default: up to the first with experts)" in notes


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"model": "deepseek-v3", "experts": 12}, "8 of 12 experts in 8 groups", "experts=16"),
        ({"model": "deepseek-v3", "experts": 1}, "8 of 1 experts in 8 groups", "experts=16"),
        ({"model": "qwen3-moe-tiny", "experts": 1}, "2 of 1 experts in 1 groups", "experts=2"),
        ({"experts": 4}, "qwen3-tiny has no experts", "Leave experts out"),
        ({"weights": "folder", "experts": 4}, "weights are those of the model as it is", "Leave experts or weights out"),
    ],
)
def test_experts_that_cannot_be_so_many(fields, message, hint) -> None:
    with pytest.raises(CpbenchError) as caught:
        resolve(parse_scenario(fields), CPU)
    assert message in caught.value.message
    assert hint in caught.value.hint
