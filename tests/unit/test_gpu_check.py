"""The checks and the race for a CUDA card: their order, time, reports, and their code on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scripts import gpu_check, gpu_race
from scripts.gpu.bench import TINY, Bench, NotHere
from scripts.gpu.older_torch import missing_arguments
from scripts.gpu.race.contest import Contestant, Race, contestants
from scripts.gpu.race.stopwatch import Stopwatch, seconds_of
from scripts.gpu.report import Check, Report, differing, pins, run_checks
from scripts.gpu.training import Mode, cut

CPU = torch.device("cpu")
NO_CARD = not torch.cuda.is_available()


def passing(bench: Bench) -> str:
    return f"{bench.note('figure', 7)} of 7"


def failing(bench: Bench) -> str:
    return bench.at_most(0.5, 1e-3, "error")


def nan(bench: Bench) -> str:
    return bench.at_most(float("nan"), 1e-3, "error")


def broken(bench: Bench) -> str:
    raise ValueError("first line\nlast line")


def without_memory(bench: Bench) -> str:
    raise torch.OutOfMemoryError("CUDA out of memory")


def on_a_card(bench: Bench) -> str:
    bench.needs_card()
    return "never here"


@pytest.mark.parametrize(
    ("check", "result", "text"),
    [
        (passing, "pass", "7 of 7"),
        (failing, "FAIL", "error 5.0e-01, at most 1e-03 is allowed"),
        (nan, "FAIL", "error nan, at most 1e-03 is allowed"),
        (broken, "FAIL", "ValueError: last line"),
        (without_memory, "FAIL", "out of memory: CUDA out of memory"),
        (on_a_card, "not here", "needs a card"),
    ],
)
def test_a_result_never_hides_the_next(
    tmp_path: Path, check: Callable[[Bench], str], result: str, text: str
) -> None:
    report = Report(tmp_path / "check.json", CPU, None)
    checks = [Check("first", 1, check), Check("second", 1, passing)]
    run_checks(Bench(tmp_path, CPU, TINY), checks, report)
    written = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    first, second = written["checks"]
    assert (first["result"], first["text"]) == (result, text)
    assert (second["result"], second["figures"]) == ("pass", {"figure": 7})
    assert second["estimated_seconds"] == 1
    assert written["machine"]["versions"]["torch"] == torch.__version__


def test_figures_of_a_failed_check_are_written(tmp_path: Path) -> None:
    report = Report(tmp_path / "check.json", CPU, None)
    run_checks(Bench(tmp_path, CPU, TINY), [Check("one", 1, failing)], report)
    assert report.results[0]["figures"] == {"error": 0.5}


def test_a_check_that_no_longer_fits_is_skipped_and_a_short_one_runs(tmp_path: Path) -> None:
    report = Report(tmp_path / "check.json", CPU, 1)
    bench = Bench(tmp_path, CPU, TINY, deadline=time.monotonic() + 60)
    run_checks(bench, [Check("long", 600, broken), Check("short", 1, passing)], report)
    assert [one["result"] for one in report.results] == ["skipped", "pass"]
    assert "it takes about 600" in report.results[0]["text"]


def test_versions_that_differ_from_the_pins_are_named() -> None:
    found = {"torch": "2.11.0+cu130", "peft": "0.21.2+local", "triton": "3.6.0"}
    wanted = {"torch": "2.13.0", "peft": "0.21.2"}
    assert differing(found, wanted) == {"torch": "2.11.0+cu130 (pinned: 2.13.0)"}
    assert "torch" in pins()


@pytest.mark.slow
def test_this_torch_has_every_argument_of_varlen_attention() -> None:
    assert missing_arguments() == ()


def test_checks_have_unique_names_and_the_most_valuable_first() -> None:
    names = [check.name for check in gpu_check.checks()]
    assert len(set(names)) == len(names) > 50
    assert names.index("gradients at real widths, nf4") < names.index("qlora merge, nf4")
    first = sum(check.seconds for check in list(gpu_check.checks())[:30])
    assert first < 570, "the most valuable checks have to fit into ten minutes"


@pytest.mark.skipif(not NO_CARD, reason="there is a card")
@pytest.mark.parametrize("main", [gpu_check.main, gpu_race.main])
def test_without_a_card_nothing_is_checked(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 3
    assert "no CUDA card here" in capsys.readouterr().out


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(SystemExit, match="no check has unknown in its name"):
        gpu_check.main(["--only", "unknown"])


@pytest.mark.parametrize(("tokens", "documents"), [(96, 3), (8192, 12), (2048, 6), (400, 4)])
def test_rows_have_different_lengths_that_add_up(tokens: int, documents: int) -> None:
    for seed in range(20):
        lengths = cut(tokens, documents, seed)
        assert sum(lengths) == tokens
        assert min(lengths) >= 2
        assert len(set(lengths)) > 1


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(8))
        self.config = SimpleNamespace(num_hidden_layers=8)


def test_the_stopwatch_times_all_layers_and_then_half() -> None:
    decoder, counted = Decoder(), []
    watch = Stopwatch(decoder, CPU, timed=2)
    for step in range(watch.num_steps):
        watch.begin()
        counted.append(len(decoder.layers))
        watch.end(float(step))
    assert counted == [8, 8, 8, 8, 4, 4, 4]
    result = watch.result()
    assert (result["layers"], [len(one) for one in result["seconds"]]) == (8, [2, 2])
    assert decoder.config.num_hidden_layers == 4
    assert result["losses"] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("whole", "half", "expected"), [(1.0, 0.6, 3.4), (1.0, 1.0, 1.0), (1.0, 1.1, 1.0)]
)
def test_seconds_are_scaled_by_those_of_a_layer(whole: float, half: float, expected: float) -> None:
    result = {"step_seconds": whole, "half_seconds": half, "layers": 8}
    assert seconds_of(result, 32) == pytest.approx(expected)


def test_a_trainer_that_is_not_installed_is_a_row(tmp_path: Path) -> None:
    race = Race(Bench(tmp_path, CPU, TINY), [])
    row = race.run(Contestant("other", "trl", Mode(), needs=("no_such_trainer",)))
    assert row["note"] == "not installed: no_such_trainer"
    assert not gpu_race.is_failure(row)
    assert "| other |" in gpu_race.table([row])
    names = {(one.name, one.mode) for one in contestants()}
    assert len(names) == len(list(contestants()))
    assert {name for name, _ in names} >= {"qlora", "peft", "trl, padding-free", "unsloth"}


@pytest.mark.skipif(not NO_CARD, reason="scripts/gpu_check.sh does this on a card")
def test_the_checks_of_attention_run_on_a_cpu(tmp_path: Path) -> None:
    words = ["attention: ", "attention at once", "attention by"]
    chosen = [one for one in gpu_check.checks() if any(word in one.name for word in words)]
    report = Report(tmp_path / "check.json", CPU, None)
    run_checks(Bench(tmp_path, CPU, TINY), chosen, report)
    assert not [one for one in report.results if one["result"] == "FAIL"]
    assert report.count("pass") == 3


@pytest.mark.slow
@pytest.mark.skipif(not NO_CARD, reason="scripts/gpu_check.sh does this on a card")
def test_every_check_runs_on_a_cpu(tmp_path: Path) -> None:
    commands = ("qlora eval", "qlora generate", "qlora merge", "nf4 in fp", "int8 in", "none in")
    names = [one.name for one in gpu_check.checks() if not one.name.startswith(commands)]
    left_out = ("qlora train, ", "speed: nf4 compiled", "speed: none")  # on a CPU as fused
    words = [name for name in names if not name.startswith(left_out)]
    file = tmp_path / "check.json"
    status = gpu_check.main(["--device", "cpu", "--json", str(file), "--only", *words])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert status == 0, [one for one in found["checks"] if one["result"] == "FAIL"]
    assert found["counts"]["pass"] > 20
    assert found["counts"]["skipped"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not NO_CARD, reason="scripts/gpu_race.py does this on a card")
def test_the_race_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "race.json"
    words = ["qlora nf4 fused, recomputed", "qlora none plain, kept", "peft nf4", "trl", "unsloth"]
    status = gpu_race.main(["--device", "cpu", "--json", str(file), "--only", *words])
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert status == 0, rows
    timed = [row for row in rows if "note" not in row]
    assert len(timed) >= 4
    assert all(row["tokens_per_second"] > 0 for row in timed)
    losses = [row["losses"][0] for row in timed if row["mode"].startswith("nf4")]
    assert max(losses) == pytest.approx(min(losses), rel=1e-2)


def test_not_here_is_told_with_its_reason(tmp_path: Path) -> None:
    def check(bench: Bench) -> str:
        raise NotHere("only the other way: error 1e-3")

    report = Report(tmp_path / "check.json", CPU, None)
    run_checks(Bench(tmp_path, CPU, TINY), [Check("one", 1, check)], report)
    assert report.results[0]["text"] == "only the other way: error 1e-3"
