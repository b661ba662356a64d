"""Names make a tree, tools see every span once, and nothing happens without one or inside a compiled region."""

import threading

import pytest
import torch

from cpbench.kernels import load_kernel
from cpbench.models.presets import load_config
from cpbench.program import run_locally
from cpbench.tracing import spans
from cpbench.tracing.spans import ATTENTION, KERNEL, LAYER, TIMED, Category, Nvtx, TorchProfile, collective, using
from tests.unit.test_strategies import PARALLEL, make


class Notes:
    """A tool that writes down what it sees, per thread."""

    def __init__(self):
        self.seen, self.open = [], threading.local()

    def enter(self, path, category, payload):
        self.stack().append(path)
        self.seen.append((path, category, payload))

    def exit(self):
        self.stack().pop()

    def stack(self):
        if not hasattr(self.open, "stack"):
            self.open.stack = []
        return self.open.stack


def test_names_form_a_tree_and_numbers_are_payloads():
    notes = Notes()
    with using(notes), TIMED(), LAYER(3), ATTENTION(), collective("cp", "all_gather")(64):
        assert spans.path() == "layer/attention/cp.all_gather"
    assert notes.seen == [
        ("harness/timed", Category.HARNESS, None),
        ("layer", Category.LAYER, 3),
        ("layer/attention", Category.ATTENTION, None),
        ("layer/attention/cp.all_gather", Category.COMMUNICATION, 64),
    ]
    assert notes.stack() == []


def test_without_a_tool_nothing_is_named():
    with LAYER(3) as nothing, ATTENTION():
        assert nothing is None
        assert spans.path() == ""
        assert not spans.watched()


def test_a_tool_can_begin_inside_of_a_span_of_the_harness():
    notes = Notes()
    with using(Notes()), TIMED(), using(notes), LAYER():
        assert spans.path() == "layer"
    assert [path for path, _, _ in notes.seen] == ["layer"]


def test_a_tool_cannot_begin_inside_of_a_span():
    with using(Notes()), LAYER(), pytest.raises(RuntimeError, match="a tool cannot begin inside of layer"), using(Notes()):
        pass


def test_spans_that_an_exception_leaves_are_closed():
    notes = Notes()
    with pytest.raises(ValueError, match="in the middle"), using(notes), LAYER(), ATTENTION():
        raise ValueError("in the middle")
    assert notes.stack() == []
    with using(notes):
        assert spans.path() == ""


def test_threads_have_trees_of_their_own():
    notes, paths = Notes(), []

    def thread():
        with ATTENTION():
            paths.append(spans.path())

    with using(notes), LAYER():
        other = threading.Thread(target=thread)
        other.start()
        other.join()
    assert paths == ["attention"]


def test_compiled_regions_are_left_alone():
    notes = Notes()

    def work(x):
        with KERNEL():
            return x + 1

    compiled = torch.compile(work, backend="eager", fullgraph=True)
    with using(notes):
        assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
        assert notes.seen == []
        work(torch.ones(2))
    assert [path for path, _, _ in notes.seen] == ["kernel"]


def test_nvtx_ranges_have_domain_category_colour_and_payload(monkeypatch):
    calls = []

    class Domain:
        def get_category_id(self, name):
            return {"layer": 7}[name]

        def get_event_attributes(self, message, color, category):
            calls.append((message, color, category))
            return type("Attributes", (), {"payload": None})()

        def push_range(self, attributes):
            calls.append(("push", attributes.payload))

        def pop_range(self):
            calls.append("pop")

    import nvtx

    monkeypatch.setattr(nvtx, "get_domain", lambda name: {"cpbench": Domain()}[name])
    with using(Nvtx()):
        for index in (4, 5):
            with LAYER(index):
                pass
    assert calls == [("layer", "teal", 7), ("push", 4), "pop", ("push", 5), "pop"], "attributes are made once"


def test_nvtx_takes_what_it_is_given():
    with using(Nvtx()), LAYER(3), ATTENTION(), collective("tp", "all_reduce")(1 << 40):
        pass


def test_the_profiler_sees_the_names():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, using(TorchProfile()), LAYER(), ATTENTION():
        torch.ones(2) + 1
    assert {"layer", "layer/attention"} <= {event.name for event in profile.events()}


@pytest.mark.parametrize("environment", [{}, {"NVTX_INJECTION64_PATH": "/opt/tool.so"}])
def test_nvtx_is_for_processes_with_a_tool(environment):
    assert [type(tool) for tool in spans.injected_tools(environment)] == [Nvtx] * len(environment)


@pytest.mark.parametrize("strategy", PARALLEL)
def test_every_strategy_names_its_attention_and_its_collectives(strategy):
    """What no span covers, nobody finds in a trace."""
    notes = Notes()
    cell = make(strategy, "contiguous" if strategy.startswith("ulysses") else "zigzag", (64,), load_config("qwen3-tiny"), "prefill", cp=2)
    with using(notes):
        run_locally(cell, load_kernel("cpu_flash"), torch.device("cpu"))
    paths = {path for path, _, _ in notes.seen}
    assert {"embed", "layer", "layer/attention", "layer/attention/project", "layer/attention/output", "layer/mlp", "head"} <= paths
    assert any((path.startswith("layer/attention/") and path.endswith("/kernel")) or path == "layer/attention/kernel" for path in paths)
    moved = [path for path in paths if path.startswith("layer/attention/") and path.endswith((".all_gather", ".send_recv", ".all_to_all"))]
    assert moved, f"{strategy} moves nothing under a name: {sorted(paths)}"
    assert all(f"{path}.wait" in paths for path in moved)
