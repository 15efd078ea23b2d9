"""The race: what is counted and how, without another trainer and without a model."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.race.contestants import CONTESTANTS, Contestant, Sizes, micro_batch_of, named
from benchmarks.race.figures import fastest, has_rows, loss_difference, of_run, together
from benchmarks.race.floor import Geometry, best_of, operations, seconds_of_step
from benchmarks.race.machine import Busy, others_share
from benchmarks.race.options import interpreters, parse, told
from benchmarks.race.page import BEGIN, END, as_markdown, put_between, readme_table
from benchmarks.race.process import Mark, Observed, Tail, environment, read, watch
from benchmarks.race.rows import Rows, fitting, in_our_order
from qlora_cli.types import Example

ROOT = Path(__file__).parents[2]

SMOLLM = Geometry(
    hidden=576,
    intermediate=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocabulary=49152,
)


# The floor.


def test_geometry_of_a_config() -> None:
    config = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    }
    assert Geometry.of(config) == SMOLLM
    assert sum(shape.size * shape.count for shape in SMOLLM.linears) == 106_168_320


def test_geometry_is_read_from_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    model = LlamaForCausalLM(config)
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    geometry = Geometry.of(config.to_dict())
    assert sum(shape.size * shape.count for shape in geometry.linears) == weights
    assert geometry.head.size == model.lm_head.weight.numel()


def test_operations_of_a_step() -> None:
    """By hand, from the sizes of SmolLM2-135M: two rows of 100 and 300 tokens, 50 supervised."""
    found = operations(SMOLLM, lengths=[100, 300], supervised=50, r=16)
    assert found["linears"] == 4 * 400 * 106_168_320
    assert found["head"] == 4 * 50 * 576 * 49152
    # The adapter of r=16 has 4,884,480 weights.
    assert found["adapter"] == 6 * 400 * 4_884_480
    assert found["attention"] == 6 * 2 * (100**2 + 300**2) / 2 * 576 * 30


def test_attention_is_counted_row_by_row() -> None:
    apart = operations(SMOLLM, lengths=[100, 100], supervised=0, r=1)
    together = operations(SMOLLM, lengths=[200], supervised=0, r=1)
    assert together["attention"] == 2 * apart["attention"]
    assert together["linears"] == apart["linears"]


def test_seconds_of_a_step() -> None:
    counted = {"linears": 100.0, "head": 30.0, "adapter": 8.0, "attention": 2.0}
    rates = {"linears_per_second": 10.0, "head_per_second": 15.0, "dequantize_seconds": 0.5}
    assert seconds_of_step(SMOLLM, counted, rates, micro_steps=4) == pytest.approx(
        {
            "linears": 10.0,
            "head": 2.0,
            "adapter": 0.8,
            "attention": 0.2,
            "dequantize": 4.0,
            "all": 17.0,
        }
    )


def test_the_floor_takes_the_best_rates() -> None:
    some = {"linears_per_second": 1.0, "head_per_second": 4.0, "dequantize_seconds": 3.0}
    more = {"linears_per_second": 2.0, "head_per_second": 3.0, "dequantize_seconds": 5.0}
    assert best_of([some, more]) == {
        "linears_per_second": 2.0,
        "head_per_second": 4.0,
        "dequantize_seconds": 3.0,
    }


# What is seen of a run, and its figures.


def mark(at: float, *, cpu: float = 0.0, used: float = 0.0, rss: float = 0.0, peak: float = 0.0):
    return Mark(at, cpu, Busy(used, 0.0), rss, peak)


def observed(*, others: float = 0.0) -> Observed:
    """Loaded after 10 s; steps of 100, 200 and 300 tokens that take 5, 2 and 4 s."""
    seen = Observed(mark(0.0))
    seen.loaded = mark(10.0, cpu=8.0, used=8.0, rss=900, peak=1500)
    for at, tokens, loss, peak in [
        (15, 100, 2.0, 1900),
        (17, 300, 1.5, 2000),
        (21, 600, 1.2, 2000),
    ]:
        cpu = 8.0 + 1.5 * (at - 10)
        step = {"loss": loss, "tokens_so_far": tokens, "supervised": tokens / 2}
        used = cpu + others * (at - 10)
        seen.steps.append((mark(at, cpu=cpu, used=used, rss=1800, peak=peak), step))
    return seen


def figures_of(seen: Observed, **more: Any) -> dict[str, Any]:
    options = {"warmup": 1, "threads": 2, "num_processors": 2, "interpreter_mb": 400.0} | more
    return of_run(seen, **options)


def test_figures_of_a_run_are_computed_from_its_steps() -> None:
    found = figures_of(observed())
    # 200 and 300 tokens in the 6 s after the first step.
    assert found["tokens_per_second"] == pytest.approx(500 / 6)
    assert found["best_step_tokens_per_second"] == pytest.approx(100.0)
    assert found["cpu_seconds_per_1000_tokens"] == pytest.approx(9.0 / 500 * 1000)
    assert found["seconds_to_first_step"] == 15
    assert found["step_seconds"] == [5, 2, 4]
    assert found["tokens"] == [100, 200, 300]
    assert found["processors_kept_busy"] == pytest.approx(0.75)
    assert not found["is_busy"]


def test_memory_counts_from_the_interpreter_and_from_the_loaded_model() -> None:
    found = figures_of(observed())
    assert found["peak_mb"] == 2000
    assert found["above_interpreter_mb"] == 1600
    assert found["above_loaded_mb"] == 1100


def test_a_peak_while_loading_does_not_count_as_training() -> None:
    seen = observed()
    seen.loaded = mark(10.0, cpu=8.0, used=8.0, rss=900, peak=5000)
    found = figures_of(seen)
    assert found["peak_mb"] == 5000
    assert found["above_loaded_mb"] == 1100


def test_without_warmup_the_first_step_counts_from_the_loaded_model() -> None:
    assert figures_of(observed(), warmup=0)["tokens_per_second"] == pytest.approx(600 / 11)


def test_a_busy_machine_is_noticed() -> None:
    assert figures_of(observed(others=0.3))["others_share"] == pytest.approx(0.15)
    assert figures_of(observed(others=0.3))["is_busy"]
    seen = observed()
    seen.others_before = 0.5
    assert figures_of(seen)["is_busy"]
    assert figures_of(seen)["others_share_most"] == 0.5


def test_stolen_time_counts_as_use_by_others() -> None:
    share = others_share(
        Busy(10.0, 1.0), Busy(14.0, 2.0), own_seconds=3.0, seconds=4.0, num_processors=2
    )
    assert share == pytest.approx((1.0 + 1.0) / 8)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_contestant_with_too_few_steps_fails(steps: int) -> None:
    seen = observed()
    del seen.steps[steps:]
    assert figures_of(seen) == {"failed": f"{steps} steps were seen"}


def test_loss_difference_is_the_largest_of_all_steps() -> None:
    run, reference = (
        {"losses": losses, "tokens": [1, 1], "supervised": [1, 1]}
        for losses in ([2.02, 0.99], [2.0, 1.0])
    )
    assert loss_difference(run, reference) == pytest.approx(0.01)
    assert loss_difference(run | {"supervised": [1, 2]}, reference) is None


def test_rows_are_compared_step_by_step() -> None:
    rows = Rows(Path(), Path(), Path(), lengths=[[3, 4], [5, 6]], supervised=[[1, 2], [3, 4]])
    assert has_rows({"tokens": [7, 11], "supervised": [3, 7]}, rows)
    assert not has_rows({"tokens": [11, 7], "supervised": [3, 7]}, rows)


def test_repetitions_give_medians_and_a_spread() -> None:
    runs = [figures_of(observed()) for _ in range(3)]
    for run, speed in zip(runs, (30.0, 10.0, 20.0), strict=True):
        run["tokens_per_second"] = speed
    runs[2]["is_busy"] = True
    found = together([*runs, {"failed": "killed"}])
    assert found["tokens_per_second"] == 20.0
    assert found["tokens_per_second_spread"] == [10.0, 30.0]
    assert found["is_busy"]
    assert (found["repetitions"], found["num_failed"]) == (3, 1)
    assert together([{"failed": "killed"}]) == {"failed": "killed", "repetitions": 0}


def test_the_busy_mark_shows_the_highest_share_before_or_in_a_run() -> None:
    quiet, before, during = observed(), observed(), observed(others=0.3)
    before.others_before = 0.4
    found = together([figures_of(seen) for seen in (quiet, before, during)])
    assert found["others_share"] == pytest.approx(0.0)  # the median
    report = a_report()
    report["races"][0]["results"]["ours"] |= {
        name: found[name] for name in ("is_busy", "others_share", "others_share_most")
    }
    assert "| busy: others had up to 40% |" in as_markdown(report)
    # A report of before it was stored.
    del report["races"][0]["results"]["ours"]["others_share_most"]
    assert "| busy |" in as_markdown(report)


def test_the_fastest_of_those_that_ran() -> None:
    heats = {"a": {"tokens_per_second": 1.0}, "b": {"tokens_per_second": 2.0}, "c": {"failed": ""}}
    assert fastest(heats) == "b"
    assert fastest({"c": {"failed": ""}}) is None


# Running and watching.

PEER = """
import json, sys, time
lines = open(sys.argv[1], "a", buffering=1)
print("{'loss': 9.9}", flush=True)
def tell(**facts):
    lines.write(json.dumps(facts) + "\\n")
loading = bytearray(256 * 2**20)
del loading
tell(event="loaded", trained_dtypes=["float32"])
time.sleep(0.1)
held = bytearray(64 * 2**20)
for step in range(3):
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    tell(event="step", loss=1.0 / (step + 1), tokens_so_far=10 * (step + 1), supervised=4)
    time.sleep(0.1)
"""


def watch_script(script: str, folder: Path, limit: float = 60.0) -> Observed:
    one = CONTESTANTS["plain"]
    command = [sys.executable, "-c", script, str(one.lines(folder))]
    return watch(one, command, folder, environment(1, project=None), limit=limit)


def test_a_process_is_watched_from_outside(tmp_path: Path) -> None:
    seen = watch_script(PEER, tmp_path)
    assert not seen.failure
    assert seen.facts == {"trained_dtypes": ["float32"]}
    assert [step["loss"] for _, step in seen.steps] == [1.0, 1 / 2, 1 / 3]
    (first, _), _, (last, _) = seen.steps
    assert 0.15 < last.cpu_seconds - first.cpu_seconds < last.at - first.at
    assert seen.loaded is not None
    assert 60 < last.peak_mb - seen.loaded.resident_mb < 200 < seen.loaded.peak_mb


def test_the_end_of_the_log_explains_why_a_process_failed(tmp_path: Path) -> None:
    seen = watch_script("raise SystemExit('no such option')", tmp_path)
    assert seen.failure == "no such option"
    assert figures_of(seen) == {"failed": "no such option"}


def test_a_process_that_has_just_ended_can_still_be_read() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seen = read(psutil.Process(process.pid), time.perf_counter())
    assert process.wait() == 0
    assert (seen.resident_mb, seen.peak_mb) == (0.0, 0.0)
    assert seen.cpu_seconds > 0


def test_a_process_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    seen = watch_script("import time; time.sleep(60)", tmp_path, limit=0.3)
    assert seen.failure.startswith("stopped after")


def test_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text("one\ntw", encoding="utf-8")
    assert tail.read() == ["one"]
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert tail.read() == ["two"]
    assert tail.read() == []


def test_peers_do_not_get_our_pythonpath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    assert "PYTHONPATH" not in environment(2, project=None)
    assert environment(2, project=Path("here"))["PYTHONPATH"] == "here"
    assert environment(2, project=None)["OMP_NUM_THREADS"] == "2"


# Contestants.

ROWS = Rows(Path("c"), Path("o"), Path("l"), lengths=[[1]], supervised=[[1]])


def test_our_contestant_runs_the_command_line_with_a_valid_recipe(tmp_path: Path) -> None:
    from qlora_cli.recipe.load import load_recipe

    one = named([], ["mine data.packing=true training.micro_batch_size=8"])[0]
    command = one.command("python", Path("base"), ROWS, Sizes(rows_per_step=8), tmp_path)
    assert command[:4] == ["python", "-m", "qlora_cli", "train"]
    overrides = [word for before, word in itertools.pairwise(command) if before == "--set"]
    recipe = load_recipe(Path(command[4]), overrides).recipe
    assert recipe.training.batch_size == 8
    assert recipe.training.micro_batch_size == 8
    assert recipe.data.packing


def test_our_output_is_parsed() -> None:
    from qlora_cli.models.report import TrainedCounts, TrainedModules

    ours = CONTESTANTS["ours"]
    table = TrainedCounts([TrainedModules("q_proj", 2, 64)], trained=64, total=1064).summary()
    assert ours.loaded([], [f"INFO {table.splitlines()[0]}"]) == {}
    assert ours.loaded([], ["base model: 1,000 weights"]) is None
    line = json.dumps({"step": 1, "loss": 2.0, "tokens": 30, "supervised_tokens": 9.0})
    assert ours.step(line) == {"loss": 2.0, "tokens_so_far": 30, "supervised": 9.0}
    assert ours.step('{"step": 1, "eval_loss": 2.0}') is None


def test_a_peers_job_describes_the_same_work(tmp_path: Path) -> None:
    command = CONTESTANTS["trl-single"].command("py", Path("base"), ROWS, Sizes(r=8), tmp_path)
    assert command[:2] == ["py", str(Path(command[1]))]
    assert Path(command[1]).is_file()
    job = json.loads(Path(command[2]).read_text(encoding="utf-8"))
    assert (job["r"], job["micro_batch"], job["rows"]) == (8, 1, "o")
    assert job["sft"] == {"gradient_checkpointing": False}


def test_every_contestant_has_its_script(tmp_path: Path) -> None:
    for one in CONTESTANTS.values():
        command = one.command("py", Path("base"), ROWS, Sizes(), tmp_path)
        assert any(Path(word).is_file() for word in command[1:3]) or one.kind == "ours"


def test_unknown_contestants_are_refused() -> None:
    assert [one.name for one in named(["trl", "ours", "trl"], [])] == ["trl", "ours"]
    with pytest.raises(SystemExit, match="no such contestant: nobody"):
        named(["nobody"], [])


def test_a_sweep_of_micro_batches_reaches_settings_with_their_own() -> None:
    single = CONTESTANTS["trl-single"]
    assert micro_batch_of(single, 8).options["micro_batch"] == 8
    assert micro_batch_of(CONTESTANTS["trl"], 8) == CONTESTANTS["trl"]


# Options.


def test_paths_are_not_reported() -> None:
    words = ["--data", "/secret", "--note=much", "--threads", "1", "2", "--ours", "a b=c"]
    assert told(words) == "--threads 1 2 --ours 'a b=c'"


def test_options_that_cannot_be_raced_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--data", "gsm8k", "--steps", "1"], "")
    assert "--steps: at least 2" in capsys.readouterr().err


def test_a_contestant_without_its_environment_is_named(tmp_path: Path) -> None:
    words = ["--data", "gsm8k", "--contestants", "llamafactory", "--environments", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"no environment for llamafactory: .*environments\.sh"):
        interpreters(parse(words, ""))
    made = tmp_path / "llamafactory" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.touch()
    assert interpreters(parse(words, ""))["llamafactory"] == str(made)


# The peers' scripts.


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import from their folder, as when one of them is started."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "race" / "peers")


@pytest.mark.usefixtures("peers")
def test_lines_report_the_supervised_tokens_of_a_step(tmp_path: Path) -> None:
    from lines import Lines

    one, job = CONTESTANTS["plain"], {"lines": str(CONTESTANTS["plain"].lines(tmp_path))}
    told = Lines(job)
    # A label on the first token is not supervised: no token comes before it.
    told.step(1.5, [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}])
    told.step(1.0, [{"input_ids": [4, 5], "labels": [-100, 5]}] * 2)
    steps = [one.step(line) for line in one.lines(tmp_path).read_text().splitlines()]
    assert steps == [
        {"loss": 1.5, "tokens_so_far": 3, "supervised": 1},
        {"loss": 1.0, "tokens_so_far": 7, "supervised": 2},
    ]


@pytest.mark.usefixtures("peers")
def test_packs_hold_as_much_as_the_rows() -> None:
    from lines import packs_per_step

    rows = [{"input_ids": [0] * length, "labels": []} for length in (100, 300)]
    assert packs_per_step(rows, 16, 1024) == 3
    assert packs_per_step(rows, 2, 1024) == 1


@pytest.mark.usefixtures("peers")
def test_the_reference_is_the_loss_of_the_model_itself() -> None:
    """Padded and only at supervised positions, it is the sum over the rows one by one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from with_transformers import loss_sum

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear"))
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5]},
        {"input_ids": [6, 7, 8], "labels": [-100, 7, 8]},
    ]
    with torch.no_grad():
        wanted = 0.0
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            count = int((labels[:, 1:] != -100).sum())
            wanted += model(input_ids=ids, labels=labels).loss.item() * count
        assert loss_sum(model, rows).item() == pytest.approx(wanted, rel=1e-6)


# Rows.


def test_fitting_finds_the_largest_number_that_fits() -> None:
    assert fitting(lambda n: 2 * n + 1, 10) == 4
    assert fitting(lambda n: n + 20, 10) == 0
    assert fitting(lambda n: n, 10) == 10


def test_rows_are_in_the_order_of_our_stream() -> None:
    from qlora_cli.data.batching.sampler import BatchStream

    examples = [Example([i] * (3 + i), [-100] + [i] * (2 + i)) for i in range(10)]
    steps = in_our_order(examples, rows_per_step=4, seed=7)
    stream = BatchStream(
        examples, batch_size=4, micro_batch_size=2, seed=7, epochs=1, pad_token_id=0
    )
    assert [len(step) for step in steps] == [4, 4, 2]
    for number, step in enumerate(steps):
        taken = {int(row[0]) for batch in stream.micro_batches(number) for row in batch.input_ids}
        assert {example.input_ids[0] for example in step} == taken
    assert [e.input_ids[0] for step in steps for e in step] != list(range(10))


# The page.


def a_report() -> dict[str, Any]:
    figures = together([figures_of(observed())]) | {
        "loss_difference": 0.0123,
        "share_of_floor": 0.4,
        "has_same_rows": True,
    }
    packed = figures | {"loss_difference": None, "trained_dtypes": ["bfloat16"]}
    rates = {"linears_per_second": 1e12, "head_per_second": 5e11}
    return {
        "command": "python -m benchmarks.race",
        "commit": "abc",
        "processor": "A processor",
        "processors": 2,
        "model": "A model",
        "note": "",
        "sizes": vars(Sizes()),
        "warmup": 1,
        "repetitions": 2,
        "versions": {"ours": {"torch": "2.13.0"}},
        "races": [
            {
                "threads": 2,
                "about": {"ours": "kept", "trl": "defaults", "trl-packing": "packed"},
                "results": {
                    "ours": figures,
                    "trl": {"failed": "a\nlast line", "repetitions": 0},
                    "trl-packing": packed,
                },
                "heats": {"trl-packing": packed},
                "reference_losses": [2.0, 1.5, 1.2],
                "rows": {
                    "steps": 3, "tokens": 600, "supervised": 300, "shortest": 3, "longest": 9,
                },
                "floor": {
                    "seconds_per_step": {"linears": 1.0, "all": 1.5},
                    "tokens_per_second": 200.0,
                    "rates": rates,
                },
            }
        ],
        "growth": [{"by": "length", "value": 4096, "threads": 2, "contestant": "ours", **figures}],
    }  # fmt: skip


def test_the_page_holds_the_figures() -> None:
    page = as_markdown(a_report())
    assert "| `ours`: kept | 83 | 18.00 | 2,000 | 1,600 | 1,100 | 15.0 | 40% | 1.23% |  |" in page
    assert "| `trl`: defaults | failed: last line |" in page
    assert "other rows | adapter in bfloat16 |" in page
    assert "| 4,096 | `ours` | 2 | 83 | 2,000 | 1,100 |" in page
    paragraphs = [part.splitlines() for part in page.split("\n\n")]
    tables = [lines for lines in paragraphs if lines[0].startswith("|")]
    assert len(tables) == 4
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_the_short_table_goes_between_the_marks() -> None:
    table = readme_table(a_report())
    assert "| `ours`: kept | 83 | 2,000 | 1,100 | 15 | 1.23% |" in table
    assert "last line" not in table
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert put_between(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter"
    for wrong in ("nothing", f"{END}{BEGIN}", text * 2):
        with pytest.raises(ValueError, match="once each"):
            put_between(wrong, "new")


def test_contestants_are_listed_under_their_names() -> None:
    assert all(name == one.name for name, one in CONTESTANTS.items())
    assert isinstance(CONTESTANTS["reference"], Contestant)
