"""CONTRIBUTING.md says where something new goes. A toy of each kind is added by its text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

import pytest
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from qlora_cli.adapters import AdapterConfig
from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.common.config import Config
from qlora_cli.data.formats import FormatConfig
from qlora_cli.data.prompts import PromptReader
from qlora_cli.distributed.world import World
from qlora_cli.loop.trackers import Fanout
from qlora_cli.models import quantization
from qlora_cli.models.base import load_model
from qlora_cli.models.loading import compute_dtype
from qlora_cli.models.quantization import QuantizationConfig
from qlora_cli.objectives import ObjectiveConfig
from qlora_cli.objectives.base import Objective, evaluate_objective
from qlora_cli.optim import schedules
from qlora_cli.optim.base import Groups, Optimizer
from qlora_cli.optim.optimizers import OptimizerConfig
from qlora_cli.optim.schedules import ScheduleConfig
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.sections import Output
from qlora_cli.tasks import TaskConfig
from qlora_cli.tasks.task import Measure, Outcome, Task, mean_of
from qlora_cli.types import Batch, Conversation, Message, Prompt, Row
from tests.pages import BLOCKS, ROOT

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
_CELLS = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", PAGE.split("## Add something")[1], re.M)
TABLE = {kind: (places, members) for kind, places, members in _CELLS[1:]}
"""Kind -> the cells that say where it goes and what to write."""

UNIONS: dict[str, tuple[str, Any]] = {
    "adapter method": ("AdapterConfig", AdapterConfig),
    "quantization": ("QuantizationConfig", QuantizationConfig),
    "data format": ("FormatConfig", FormatConfig),
    "optimizer": ("OptimizerConfig", OptimizerConfig),
    "schedule": ("ScheduleConfig", ScheduleConfig),
    "task that scores generated answers": ("TaskConfig", TaskConfig),
    "other task": ("TaskConfig", TaskConfig),
    "objective": ("ObjectiveConfig", ObjectiveConfig),
}


def places(kind: str) -> list[Path]:
    """Return the files and folders that a row names; the first is the folder or file of the kind.

    A file without a folder is in the one that the row names.
    """
    cell = TABLE["task that scores generated answers" if kind == "other task" else kind][0]
    named = re.findall(r"`([\w/.]+(?:\.py|/))`", cell)
    folder = next(ROOT / name for name in named if "/" in name)
    home = folder if folder.is_dir() else folder.parent
    return [folder, *(ROOT / name if "/" in name else home / name for name in named)]


def members(kind: str) -> set[str]:
    """Return what a row tells one to write."""
    return set(re.findall(r"`([a-z_]+)(?:\([\w, ]*\))?`", TABLE[kind][1]))


class ToyAdapter(AdapterMethod):
    """A method of PEFT."""

    type: Literal["toy"] = "toy"

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


class ToyQuantization(quantization._Quantized):
    """A way to hold weights."""

    type: Literal["toy"] = "toy"
    max_unquantized: ClassVar[float] = 1.0

    @property
    def held_in(self) -> tuple[str, str]:
        return "", "auto"

    def compute_in(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"dtype": dtype}


class ToyFormat(Config):
    """Rows of a question and an answer."""

    example: ClassVar[Row] = {"q": "hi", "a": "ho"}
    type: Literal["toy"] = "toy"

    def to_conversation(self, row: Row) -> Conversation:
        turns = [Message("user", row["q"], train=False), Message("assistant", row["a"], train=True)]
        return Conversation(turns)


class ToyOptimizer(Optimizer):
    """Plain descent."""

    type: Literal["toy"] = "toy"
    num_means = 0

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.learning_rate)


class ToyScoredTask(Task):
    """The answer is as long as the reference."""

    type: Literal["toy"] = "toy"

    def score(self, reference: str, answer: str) -> float:
        return float(len(reference) == len(answer))


class ToyTask(Task):
    """A task that asks nothing."""

    type: Literal["toy"] = "toy"

    def read_items(self, *_: Any, **__: Any) -> Sequence[Any]:
        return ["item"]

    def evaluate(self, scorer: Any, items: Sequence[Any]) -> list[Outcome]:
        return [Outcome("place", item, "", "", {"toy": 1.0}) for item in items]

    def measures(self) -> Sequence[Measure]:
        return [mean_of("toy")]


class ToyLoss(Objective):
    """The mean of a model's output."""

    unit: ClassVar[str] = "rows"

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(batch.input_ids.float()).sum(), {}

    def weight(self, batch: Batch) -> int:
        return len(batch.input_ids)

    def of_rows(self, batch: Batch) -> Tensor:
        return self.model(batch.input_ids.float()).sum(-1).double()


class ToyObjective(Config):
    """Its settings."""

    type: Literal["toy"] = "toy"

    def build(self, model: nn.Module, dtype: torch.dtype, cross_entropy: Any) -> Objective:
        return ToyLoss(model, dtype)


class ToyTracker:
    """It keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[object] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(metrics)))

    def close(self) -> None:
        self.lines.append("closed")


def schedule_of_the_page() -> Any:
    """Run the class that the page shows, in the module in which it would be."""
    block = next(b for b in BLOCKS if b.page.name == "CONTRIBUTING.md" and "Exponential" in b.text)
    names = {**vars(schedules), "__name__": schedules.__name__}
    exec(block.text.partition("\n\nScheduleConfig")[0], names)
    return names["Exponential"]


TOYS: dict[str, tuple[Any, set[str]]] = {
    "adapter method": (ToyAdapter, {"peft_config"}),
    "quantization": (ToyQuantization, {"load_options", "held_in", "compute_in", "max_unquantized"}),
    "data format": (ToyFormat, {"to_conversation", "example"}),
    "optimizer": (ToyOptimizer, {"_make", "num_means"}),
    "schedule": (schedule_of_the_page(), {"scale"}),
    "task that scores generated answers": (ToyScoredTask, {"score"}),
    "other task": (ToyTask, {"read_items", "evaluate", "measures"}),
    "objective": (ToyObjective, {"build"}),
}
"""Kind -> a class of that kind, and the members that it writes."""


def test_the_table_has_a_row_for_each_kind() -> None:
    assert set(TABLE) == {*UNIONS, "tracker"}


@pytest.mark.parametrize("kind", [*UNIONS, "tracker"])
def test_the_places_exist(kind: str) -> None:
    assert all(place.exists() for place in places(kind))


@pytest.mark.parametrize("kind", UNIONS)
def test_the_union_is_where_the_row_says(kind: str) -> None:
    folder, *named = places(kind)
    name, union = UNIONS[kind]
    in_files = [place for place in named if place.suffix == ".py"]
    defining = [
        path
        for path in in_files
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]
    assert len(defining) == 1, f"{name} in {in_files}"
    home = folder if folder.is_dir() else folder.parent
    for variant in _variants(union):
        module = ROOT / (variant.__module__.replace(".", "/") + ".py")
        package = module.with_suffix("") / "__init__.py"
        assert home in module.parents or home in package.parents, variant


@pytest.mark.parametrize("kind", TOYS)
def test_what_a_row_tells_to_write_is_enough_for_the_union(kind: str) -> None:
    toy, written = TOYS[kind]
    others = {"adapter method": {"attach", "save", "load", "weight_edits"},
              "objective": {"forward", "weight", "of_rows"}}  # fmt: skip
    assert members(kind) == written | others.get(kind, set())
    assert written <= set(vars(toy))
    union = Union[(*_variants(UNIONS[kind][1]), toy)]
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[union, Field(discriminator="type")])
    name = toy.model_fields["type"].default
    assert isinstance(adapter.validate_python({"type": name}), toy)


def test_a_toy_adapter_is_attached_saved_and_loaded(tiny_model: Path, tmp_path: Path) -> None:
    method = ToyAdapter()
    model = method.attach(load_model(tiny_model, dtype=torch.float32))
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    nn.init.ones_(next(p for n, p in weights.items() if "lora_B" in n))
    method.save(model, tmp_path)
    again = method.load(load_model(tiny_model, dtype=torch.float32), tmp_path)
    loaded = dict(again.named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_toy_quantization_loads_a_model(tiny_model: Path) -> None:
    toy: Any = ToyQuantization()
    dtype = compute_dtype(toy, "fp32", World())
    assert load_model(tiny_model, **toy.load_options(dtype)).dtype == torch.float32


def test_a_toy_format_is_read_for_training_and_for_prompts() -> None:
    toy: Any = ToyFormat()
    assert toy.to_conversation(ToyFormat.example).messages[-1].train
    conversation, reference = PromptReader([toy]).read(ToyFormat.example)
    assert [m.content for m in conversation.messages] == ["hi", "ho"]
    assert reference == "ho"


def test_a_toy_optimizer_moves_weights() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    toy = ToyOptimizer(learning_rate=0.5)
    optimizer = toy.build([("layer.weight", weight)], torch.device("cpu"))
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(weight, torch.full((2, 2), 0.5))
    assert toy.state_bytes == 0


def test_the_schedule_of_the_page_decays() -> None:
    schedule = schedule_of_the_page()(final_scale=0.1)
    scales = [schedule.scale(step, 10) for step in range(10)]
    assert scales[0] == 1
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] > 0.1


def test_toy_tasks_give_values_for_their_measures() -> None:
    class Answers:
        """A model that always writes the same."""

        def generate(self, prompts: Sequence[Prompt]) -> list[str]:
            return ["ho" for _ in prompts]

    scorer: Any = Answers()
    [right, wrong] = ToyScoredTask().evaluate(scorer, [Prompt([1], "hi"), Prompt([1], "hello")])
    assert (right.values, wrong.values) == ({"toy": 1.0}, {"toy": 0.0})
    assert [name for name, _ in ToyScoredTask().named_measures()] == ["toy"]
    task = ToyTask(name="mine")
    items = task.read_items([], None, None, limit=None)
    assert [outcome.values for outcome in task.evaluate(scorer, items)] == [{"toy": 1.0}]
    assert [name for name, _ in task.named_measures()] == ["mine"]


def test_a_toy_objective_is_built_and_evaluated() -> None:
    layer = nn.Linear(3, 1, bias=False)
    nn.init.ones_(layer.weight)
    objective = ToyObjective().build(layer, torch.float32, None)
    ids = torch.ones(2, 3, dtype=torch.long)
    batch = Batch(ids, None, ids)
    loss, _ = objective(batch)
    loss.backward()
    assert loss.item() == 6
    assert evaluate_objective(objective, [batch], torch.device("cpu")) == {"loss": 3}


def test_a_toy_tracker_gets_metrics() -> None:
    toy = ToyTracker()
    assert members("tracker") == {"log", "close"}
    trackers = Fanout([toy])
    trackers.log({"loss": 1.0}, 3)
    trackers.close()
    assert toy.lines == [(3, {"loss": 1.0}), "closed"]


def test_the_places_of_a_tracker_name_the_same_trackers() -> None:
    item = FieldType.of(Output.model_fields["trackers"]).item
    assert item is not None
    source = (ROOT / "qlora_cli/loop/trackers.py").read_text(encoding="utf-8")
    body = source.partition("def open_trackers")[2]
    assert set(item.choices) == set(re.findall(r'"(\w+)" in names', body))


def _variants(union: Any) -> tuple[Any, ...]:
    """Return the classes of an annotated union, or of one that has a single class."""
    return get_args(get_args(union)[0]) if get_args(union) else (union,)
