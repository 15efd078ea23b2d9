import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes.optim
import pytest
import schedulefree
import torch

from qlora_cli.errors import RecipeError
from qlora_cli.optim.base import load_states
from qlora_cli.optim.families import AdamW, AdEMAMix, Lion
from qlora_cli.optim.groups import ParameterGroup
from qlora_cli.optim.optimizers import (
    SGD,
    Adafactor,
    Muon,
    ScheduleFreeAdamW,
    _updates_together,
    lighter_twin,
)
from qlora_cli.optim.schedules import Constant
from tests.conftest import each_optimizer

CPU = torch.device("cpu")
OPTIMIZERS = each_optimizer()


def named(parameters: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    """Name parameters as in a model."""
    names = ("layers.0.weight", "layers.0.bias", "layers.1.weight")
    return list(zip(names, parameters, strict=True))


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    bias = torch.nn.Parameter(torch.randn(64, generator=generator))
    frozen = torch.nn.Parameter(torch.randn(4, 4, generator=generator), requires_grad=False)
    return [matrix, bias, frozen]


def run(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int) -> None:
    target = torch.linspace(-1, 1, 64)
    for _ in range(steps):
        loss = ((parameters[0] @ target + parameters[1]) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
def test_every_optimizer_lowers_the_loss_and_keeps_frozen_weights(config) -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = config.model_copy(update={"learning_rate": 1e-2}).build(named(parameters), CPU)
    run(optimizer, parameters, 5)
    assert not torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])
    assert torch.equal(parameters[2], before[2])


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
def test_weight_decay_applies_only_to_matrices(config) -> None:
    parameters = make_parameters()
    optimizer = config.model_copy(update={"weight_decay": 0.5}).build(named(parameters), CPU)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {id(parameters[0]): 0.5, id(parameters[1]): 0.0}


RATE, DECAY = 3e-3, 0.1
ADAM: dict[str, Any] = {"lr": RATE, "betas": (0.8, 0.95), "eps": 1e-7}
OURS: dict[str, Any] = {"learning_rate": RATE, "weight_decay": DECAY}
OUR_ADAM: dict[str, Any] = {**OURS, "beta1": 0.8, "beta2": 0.95, "eps": 1e-7}
SLOW: dict[str, Any] = {**ADAM, "betas": (0.8, 0.95, 0.99), "alpha": 3.0}
OUR_SLOW: dict[str, Any] = {**OUR_ADAM, "beta3": 0.99, "alpha": 3.0}
BNB = bitsandbytes.optim

LIBRARIES: list[tuple[Any, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (AdamW(**OUR_ADAM), torch.optim.AdamW, ADAM),
    (AdamW(type="adamw_8bit", **OUR_ADAM), BNB.AdamW8bit, ADAM),
    (Lion(**OURS, beta1=0.8, beta2=0.95), BNB.Lion, {"lr": RATE, "betas": (0.8, 0.95)}),
    (Lion(type="lion_8bit", **OURS), BNB.Lion8bit, {"lr": RATE}),
    (AdEMAMix(**OUR_SLOW), BNB.ademamix._ReferenceAdEMAMix, SLOW),
    (
        AdEMAMix(**OUR_SLOW, slow_warmup_steps=30),
        BNB.ademamix._ReferenceAdEMAMix,
        {**SLOW, "t_alpha": 30, "t_beta3": 30},
    ),
    (AdEMAMix(type="ademamix_8bit", **OUR_SLOW), BNB.AdEMAMix8bit, SLOW),
    (
        Adafactor(**OURS, beta2_decay=0.7, clip_threshold=1.5),
        torch.optim.Adafactor,
        {"lr": RATE, "beta2_decay": -0.7, "d": 1.5},
    ),
    (
        SGD(**OURS, momentum=0.7, nesterov=True),
        torch.optim.SGD,
        {"lr": RATE, "momentum": 0.7, "nesterov": True},
    ),
    (SGD(**OURS, momentum=0), torch.optim.SGD, {"lr": RATE}),
    (ScheduleFreeAdamW(**OUR_ADAM), schedulefree.AdamWScheduleFreeReference, ADAM),
]

TESTED_APART = {"muon": "test_muon_is_torchs_muon_in_the_layers_and_adamw_elsewhere"}
"""Optimizers that are not one class of a library, and their tests."""


@pytest.mark.parametrize(
    ("config", "pages", "twin"),
    [
        (AdamW(), True, "paged_adamw_8bit"),
        (AdamW(), False, "adamw_8bit"),
        (AdamW(type="adamw_8bit"), True, "paged_adamw_8bit"),
        (AdamW(type="adamw_8bit"), False, None),
        (AdamW(type="paged_adamw_32bit"), False, "paged_adamw_8bit"),
        (Lion(type="paged_lion_8bit"), True, None),
        (AdEMAMix(), True, "paged_ademamix_8bit"),
        (Muon(), True, None),
        (ScheduleFreeAdamW(), True, None),
    ],
)
def test_the_lighter_twin_has_8bit_states_and_pages(config, pages, twin) -> None:
    assert lighter_twin(config, pages=pages) == twin


def test_each_optimizer_is_compared_with_its_library() -> None:
    """Paged optimizers run unpaged here."""
    tested = {config.type for config, _, _ in LIBRARIES} | set(TESTED_APART)
    new = {config.type for config in OPTIMIZERS if not config.is_paged} - tested
    assert not new, (
        f"add {', '.join(sorted(new))} to LIBRARIES with the class that it has to equal; without "
        "one, test some steps by themselves, and name that test in TESTED_APART"
    )
    assert set(TESTED_APART.values()) <= set(globals())


@pytest.mark.parametrize(
    ("config", "library", "options"), LIBRARIES, ids=lambda one: getattr(one, "type", "")
)
def test_twenty_steps_equal_the_librarys(config, library, options) -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = config.build(named(ours), CPU)
    run(optimizer, ours, 20)
    reference = library(
        [
            {"params": theirs[:1], "weight_decay": DECAY},
            {"params": theirs[1:2], "weight_decay": 0.0},
        ],
        **options,
    )
    if config.is_schedule_free:
        reference.train()
    run(reference, theirs, 20)
    # Fused kernels and references order float32 operations differently, on weights of up to 4.
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


def test_muon_is_torchs_muon_in_the_layers_and_adamw_elsewhere() -> None:
    def make() -> torch.nn.ModuleDict:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 6))
        return torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 6), "layers": layers})

    def train(model: torch.nn.ModuleDict, *optimizers: torch.optim.Optimizer) -> None:
        for _ in range(10):
            model["layers"](model["embed"].weight).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    ours, theirs = make(), make()
    config = Muon(learning_rate=RATE, weight_decay=DECAY, beta1=0.8, momentum=0.9)
    train(ours, config.build(ours.named_parameters(), CPU))
    one, _, other = theirs["layers"]
    muon = torch.optim.Muon(
        [one.weight, other.weight],
        lr=RATE,
        weight_decay=DECAY,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = [
        {"params": [theirs["embed"].weight], "weight_decay": DECAY},
        {"params": [one.bias, other.bias], "weight_decay": 0.0},
    ]
    train(theirs, muon, torch.optim.AdamW(rest, lr=RATE, betas=(0.8, 0.999), fused=True))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_muon_without_a_matrix_in_a_layer_is_refused() -> None:
    bias = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RecipeError, match="none of the 1 trained tensors is one") as caught:
        Muon().build([("layers.0.bias", bias)], CPU)
    assert "adamw" in (caught.value.hint or "")


def test_the_warmup_equals_schedulefrees() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = ScheduleFreeAdamW(learning_rate=RATE).build(named(ours), CPU)
    reference = schedulefree.AdamWScheduleFree(theirs[:2], lr=RATE, warmup_steps=5, foreach=False)
    reference.train()
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * Constant(warmup_steps=5).scale(step, 12)
        run(optimizer, ours, 1)
        run(reference, theirs, 1)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-7)


def test_evaluation_uses_the_average_and_does_not_change_training() -> None:
    ours, theirs = make_parameters(), make_parameters()
    config = ScheduleFreeAdamW(learning_rate=1e-2)
    optimizer = config.build(named(ours), CPU)
    run(optimizer, ours, 7)
    reference = schedulefree.AdamWScheduleFree(theirs[:2], lr=1e-2, foreach=False)
    reference.train()
    run(reference, theirs, 7)
    before = ours[0].detach().clone()
    reference.eval()
    with config.evaluation_weights(optimizer):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-7)
        assert not torch.equal(ours[0], before)
    assert torch.equal(ours[0], before)
    run(optimizer, ours, 1)  # which is possible only in training mode


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
def test_each_resumes_bit_for_bit_from_its_saved_state(config) -> None:
    config = config.model_copy(update={"learning_rate": 1e-2, "weight_decay": 0.1})
    whole, cut = make_parameters(), make_parameters()
    run(config.build(named(whole), CPU), whole, 6)
    first = config.build(named(cut), CPU)
    run(first, cut, 3)
    second = config.build(named(cut), CPU)
    second.load_state_dict(first.state_dict())
    run(second, cut, 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


LORA = ("base.layers.0.lora_A.default.weight", "base.layers.0.lora_B.default.weight", "base.norm")


def lora() -> list[tuple[str, torch.nn.Parameter]]:
    shapes = ((4, 8), (8, 4), (8,))
    return [(n, torch.nn.Parameter(torch.ones(s))) for n, s in zip(LORA, shapes, strict=True)]


def settings(optimizer: torch.optim.Optimizer, parameters: Any) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of each parameter by name."""
    names = {id(p): name for name, p in parameters}
    return {
        names[id(p)]: (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
def test_groups_have_their_own_learning_rate_and_weight_decay(config) -> None:
    parameters = lora()
    groups = [
        ParameterGroup(match="lora_B", learning_rate=0.5),
        ParameterGroup(match=r"norm$|layers\.0", weight_decay=0.25),
    ]
    settings_of = {"learning_rate": 0.125, "weight_decay": 1, "groups": groups}
    config = config.model_copy(update=settings_of)
    found = settings(config.build(parameters, CPU), parameters)
    assert found == {LORA[0]: (0.125, 0.25), LORA[1]: (0.5, 1.0), LORA[2]: (0.125, 0.25)}


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
def test_lora_plus_is_a_key_or_a_group(config, caplog: pytest.LogCaptureFixture) -> None:
    parameters = lora()
    groups = [ParameterGroup(match="lora_B", learning_rate=0.5)]
    short = config.model_copy(update={"learning_rate": 0.125, "lora_plus_ratio": 4})
    long = config.model_copy(update={"learning_rate": 0.125, "groups": groups})
    with caplog.at_level(logging.INFO, logger="qlora"):
        found = settings(short.build(parameters, CPU), parameters)
    assert found == settings(long.build(parameters, CPU), parameters)
    assert found == {LORA[0]: (0.125, 0), LORA[1]: (0.5, 0), LORA[2]: (0.125, 0)}
    assert (
        "optimizer: 2 tensors, learning rate 0.125, weight decay 0; optimizer.lora_plus_ratio: "
        "1 tensor, learning rate 0.5, weight decay 0"
    ) in [record.getMessage() for record in caplog.records]


def test_a_group_that_matches_nothing_is_refused_with_similar_names() -> None:
    with pytest.raises(RecipeError, match="'lora_C' matches none of the") as caught:
        AdamW(groups=[ParameterGroup(match="lora_C", weight_decay=1)]).build(lora(), CPU)
    assert "lora_A" in (caught.value.hint or "")
    groups = [
        ParameterGroup(match="lora", weight_decay=1),
        ParameterGroup(match="lora_B", weight_decay=0),
    ]
    with pytest.raises(
        RecipeError, match=r"groups\[1\]: all parameters that match 'lora_B' .* earlier groups"
    ):
        AdamW(groups=groups).build(lora(), CPU)
    with pytest.raises(RecipeError, match=r"lora_plus_ratio: .* matches none of the"):
        AdamW(lora_plus_ratio=2).build(lora()[2:], CPU)


def test_8bit_states_stay_close_to_32_bit_ones() -> None:
    exact, rounded = make_parameters(), make_parameters()
    start = make_parameters()[0]
    run(AdamW(learning_rate=1e-2).build(named(exact), CPU), exact, 20)
    run(AdamW(type="adamw_8bit", learning_rate=1e-2).build(named(rounded), CPU), rounded, 20)
    error = (exact[0] - rounded[0]).norm() / (exact[0] - start).norm()
    assert 0 < error < 0.1


def test_paged_falls_back_without_cuda_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="qlora"):
        optimizer = AdamW(type="paged_adamw_32bit").build(named(make_parameters()), CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [record.getMessage() for record in caplog.records] == [
        "optimizer.type: paged_adamw_32bit needs CUDA for paging; using adamw instead"
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{type: adamw, groups: [{match: '(', weight_decay: 1}]}",
            "4:36  optimizer.groups[0].match: ( is not a valid regular expression: missing )",
        ),
        ("{type: adamw, groups: [{match: a}]}", "4:35  optimizer.groups[0]: sets nothing: give it"),
        ("{type: adamw, groups: [{weight_decay: 1}]}", "optimizer.groups[0].match: is missing"),
        ("{type: adamw, lora_plus_ratio: 0}", "optimizer.lora_plus_ratio: found 0; it takes a"),
        ("{type: sgd, momentum: 0, nesterov: true}", "optimizer: nesterov needs a momentum"),
        (
            "{type: schedule_free_adamw}\nschedule: {type: cosine}",
            "optimizer.type (schedule_free_adamw) averages the weights instead of decaying the "
            "learning rate, but schedule.type (cosine) decays it; use schedule.type constant",
        ),
        (
            "{type: schedule_free_adamw}\nschedule: {type: constant}\nadapter: {type: adalora}",
            "adapter.type (adalora) and optimizer.type (schedule_free_adamw) cannot be combined",
        ),
    ],
)
def test_conflicting_settings_are_refused_with_their_place(
    problems: Callable[..., list[str]], minimal: str, section: str, message: str
) -> None:
    [problem] = problems(f"{minimal}optimizer: {section}\n")
    assert message in problem


class SharedMemory:
    """Stand in for memory that bitsandbytes shares between host and GPU, which needs CUDA."""

    def __init__(self) -> None:
        self.number = 0

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        self.number += 1
        found: Any = torch.zeros(shape, dtype=dtype)
        found.is_paged = True
        return found


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["AdamW", "Lion", "AdEMAMix"])
def test_states_of_a_paged_optimizer_stay_paged_when_they_are_loaded(kind: str, bits: int) -> None:
    import bitsandbytes.optim as bnb

    memory = SharedMemory()

    class Paged(getattr(bnb, kind)):  # type: ignore[misc]  # the classes have the same interface
        def get_state_buffer(self, p: Any, dtype: torch.dtype = torch.float32) -> Any:
            return memory.make(tuple(p.shape), dtype)

        def _get_state_double_buffer(self, p: Any, dtype: torch.dtype = torch.float32) -> Any:
            return memory.make((2, *p.shape), dtype)

        def prefetch_state(self, p: Any) -> None:
            """Move nothing: there is no GPU."""

    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(320, 320))
    optimizer = Paged([parameter], optim_bits=bits, is_paged=True)
    for _ in range(2):
        parameter.grad = torch.randn(320, 320)
        optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict())
    for used_again in (False, True):  # a resumed run makes buffers, a rollback has them
        made = memory.number
        if not used_again:
            optimizer.state.clear()
        load_states(optimizer, copy.deepcopy(expected))
        state = optimizer.state[parameter]
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        large: list[Any] = [value for value in tensors if value.numel() >= 320**2]
        assert large
        assert all(value.is_paged for value in large)
        assert memory.number == made + (0 if used_again else len(large))
        for name, value in expected["state"][0].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("on_cuda", "decay", "together"), [(True, 0.0, True), (True, 0.1, False), (False, 0.0, False)]
)
def test_sgd_updates_weights_together_on_a_card_only(
    on_cuda: bool, decay: float, together: bool
) -> None:
    weights: list[Any] = [SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=on_cuda)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": decay}]
    assert _updates_together(groups) == together


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_updates_together_change_no_bit(options: dict[str, Any]) -> None:
    def trained(*, foreach: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(5, n)) for n in (1, 3, 8)]
        optimizer = torch.optim.SGD(weights, lr=0.1, foreach=foreach, **options)
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        return [weight.detach() for weight in weights]

    pairs = zip(trained(foreach=False), trained(foreach=True), strict=True)
    assert [torch.equal(*pair) for pair in pairs] == [True] * 3
