"""Scenarios by name and by path, what `extends` inherits, and the library: each is explained, fits the schema, and plans on CPUs and GPUs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.needs import needs
from cpbench.plan import make_plan
from cpbench.scenario import load_scenario, read_yaml, resolve
from cpbench.scenario_files import MOST_FILES, find, library, question

SCENARIOS = Path(__file__).parents[2] / "scenarios"
CPU = Machine("cpu", 0, 2, 16 << 30, "a CPU")
GPUS = Machine("cuda", 8, 64, 512 << 30, "a CPU", ("NVIDIA H200",) * 8, 140 << 30, "1.0")
LARGE = {"tp_sp_36k", "tp_sp_8gpus", "layout_groups", "long_context_1m"}  # for more than a laptop; a small one stands beside each
SMALL = {"smoke", "ulysses_parity", "zigzag_batches", "tp_sp_cpu", "local_map_numerics", "layout_groups_cpu", "attention_36k", "long_context_cpu"}
SCHEMA = json.loads((SCENARIOS / "schema.json").read_text())


def write(folder: Path, **files: str) -> Path:
    """Files by name; the path of the first one."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_the_library_is_the_folder_of_the_repository() -> None:
    assert set(library()) == {file.stem for file in SCENARIOS.glob("*.yaml")} >= SMALL | LARGE
    assert find("smoke") == library()["smoke"]
    assert find("./smoke.yaml") == Path("smoke.yaml")


@pytest.mark.parametrize("name", library())
def test_every_scenario_is_explained_fits_the_schema_and_plans_everywhere(name: str) -> None:
    file = library()[name]
    text = file.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert question(file).endswith("?") and f"`{name}`" in (SCENARIOS / "README.md").read_text()
    assert not list(Draft202012Validator(SCHEMA).iter_errors(yaml.safe_load(text)))
    assert read_yaml(name)["name"] == name
    for machine in (CPU, GPUS):
        scenario, _ = resolve(load_scenario(name), machine)
        assert not [planned.reason for planned in make_plan(scenario, machine).cells if planned.status == "unsupported"]


@pytest.mark.parametrize(("machine", "lacking"), [(CPU, LARGE), (GPUS, {"tp_sp_36k"})])
def test_what_a_scenario_needs_and_whether_it_is_here(machine: Machine, lacking: set[str]) -> None:
    found = {name: needs(name, file, machine) for name, file in library().items()}
    assert {name for name in SMALL | LARGE if found[name].seconds is None} == lacking
    assert all(need.missing for need in found.values() if need.seconds is None)
    assert (found["tp_sp_36k"].ranks, found["tp_sp_36k"].tokens, found["long_context_1m"].tokens) == (32, 36_000, 1 << 20)
    assert (found["zigzag_batches"].ranks, found["zigzag_batches"].tokens) == (4, 4096)


def test_some_cells_that_do_not_fit_are_counted() -> None:
    four = Machine("cuda", 4, 64, 512 << 30, "a CPU", ("NVIDIA H200",) * 4, 140 << 30, "1.0")
    need = needs("layout_groups", library()["layout_groups"], four)
    assert need.missing == "9 of 11 cells: needs 8 GPUs, this machine has 4"
    assert need.seconds is not None and need.threads_per_core == 0
    assert needs("zigzag_batches", library()["zigzag_batches"], CPU).threads_per_core == 2


def test_own_fields_stand_over_inherited_ones(tmp_path: Path) -> None:
    base = "name: below\nseq: 1k\nlayouts: [cp2]\nmodel: qwen3-tiny\nlayers: 2\ntiming: {max_samples: 5, precision: 1%}\n"
    file = write(tmp_path, top="extends: middle.yaml\ncp: [4]\ntiming: {max_samples: 7}\n", middle="extends: ./low.yaml\nlayers: null\n", low=base)
    expected = {"name": "top", "seq": "1k", "model": "qwen3-tiny", "layers": None, "cp": [4], "timing": {"max_samples": 7, "precision": "1%"}}
    assert read_yaml(file) == expected
    assert load_scenario(file).timing.max_samples == 7


def test_paths_start_at_the_folder_of_the_file_and_words_are_names_of_the_library(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path, base="seq: 3k\n", smoke="seq: 7k\n")
    write(tmp_path / "below", one="extends: ../base.yaml\ncp: 2\n", two="extends: smoke\nbatches: [{lengths: 5}]\n")
    assert read_yaml(tmp_path / "below" / "one.yaml") == {"name": "one", "seq": "3k", "cp": 2}
    assert load_scenario(tmp_path / "below" / "two.yaml").seq is None  # replaced by batches
    assert load_scenario(tmp_path / "below" / "two.yaml").strategies == load_scenario("smoke").strategies


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ({"a": "extends: a.yaml"}, "a.yaml extends a.yaml: a scenario cannot rest on itself.", "Leave extends out of a.yaml"),
        ({"a": "extends: ./b.yaml", "b": "extends: a.yaml"}, "a.yaml extends b.yaml extends a.yaml: a scenario cannot rest on itself.", "out of b.yaml"),
        ({"a": "extends: b.yaml"}, "a.yaml extends 'b.yaml', which is not there.", "the folder of a.yaml"),
        ({"a": "extends: smok"}, "a.yaml extends 'smok', which is no scenario.", "Did you mean 'smoke'?"),
        ({"a": "extends: [b.yaml]"}, "a.yaml: extends: \"['b.yaml']\" is not a scenario.", "Name one"),
        ({"a": "extends: "}, "a.yaml: extends: 'None' is not a scenario.", "smoke"),
        ({"a": 'extends: "b\\0.yaml"'}, "which is not there.", "the folder of a.yaml"),
        ({"a": f"extends: {'b' * 5000}.yaml"}, "which is not there.", "the folder of a.yaml"),
        ({"a": "extends: b.yaml", "b": "seq: [36k"}, "b.yaml is not YAML", "scenarios/smoke.yaml"),
        ({"a": "extends: b.yaml", "b": "sequence: 36k"}, "Unknown scenario field 'sequence'.", "Did you mean"),
        (
            {f"f{n}": f"extends: f{n + 1}.yaml" for n in range(MOST_FILES)} | {f"f{MOST_FILES}": "seq: 1k"},
            f"f0.yaml rests on more than {MOST_FILES - 1} other scenarios.",
            "further down",
        ),
    ],
)
def test_a_base_that_cannot_be_gets_one_sentence(files: dict[str, str], message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(CpbenchError) as caught:
        load_scenario(write(tmp_path, **files))
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.exit_code == 2 and "\n" not in caught.value.message + caught.value.hint


def test_as_many_files_as_may_be_rest_on_each_other(tmp_path: Path) -> None:
    files = {f"f{n}": f"extends: f{n + 1}.yaml" for n in range(MOST_FILES - 1)} | {f"f{MOST_FILES - 1}": "seq: 1k"}
    assert load_scenario(write(tmp_path, **files)).seq == [1024]


def test_a_word_that_is_no_scenario_gets_the_nearest_one() -> None:
    with pytest.raises(CpbenchError) as caught:
        find("long_context")
    assert caught.value.message == "Unknown scenario 'long_context'."
    assert caught.value.hint.startswith("Did you mean 'long_context_")


def test_the_example_that_extends_one_of_them_plans(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (SCENARIOS / "README.md").read_text(), re.DOTALL)
    file = write(tmp_path, mine=next(text for text in examples if text.startswith("extends: ")))
    scenario, _ = resolve(load_scenario(file), GPUS)
    plan = make_plan(scenario, GPUS)
    assert plan.runnable == plan.cells and scenario.rounds == load_scenario("tp_sp_36k").rounds


def test_what_is_needed_is_found_without_torch() -> None:
    code = (
        "import sys\nfrom cpbench.environment import Machine\nfrom cpbench.needs import needs\nfrom cpbench.scenario_files import library\n"
        "found = [needs(name, file, Machine('cpu', 0, 2, 16 << 30)) for name, file in library().items()]\nprint(len(found), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [str(len(library())), "False"]
