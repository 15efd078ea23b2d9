"""The page of results."""

from __future__ import annotations

from typing import Any


def as_markdown(reports: dict[str, dict[str, Any]]) -> str:
    """Render the page: for each form its result, the interrupted stages, and all kills."""
    lines = [
        "<!-- Written by benchmarks/random_kills/; run that instead of editing. -->",
        "# Runs that are killed at random moments",
        "",
        "SIGKILL at seeded moments. Each is followed by `--resume auto`, or by a new start if no "
        "checkpoint exists yet. `benchmarks/random_kills/__init__.py` explains how moments are "
        "drawn.",
    ]
    for name, report in reports.items():
        lines += ["", *_form_lines(name, report)]
    return "\n".join(lines) + "\n"


def _form_lines(name: str, report: dict[str, Any]) -> list[str]:
    kills = report["kills"]
    command = f"python -m benchmarks.random_kills {name} --seed {report['seed']}"
    command += " --data FOLDER_WITH_GSM8K" if name == "gsm8k" else ""
    compared = ", ".join(
        f"{what}: {found or 'the same'}"
        for what, found in report["different"].items()
        if what != "cache"
    )
    checked = sum(kill["saved"] > 0 for kill in kills)
    places: dict[str, list[int]] = {}
    for kill in kills:
        places.setdefault(kill["where"], []).append(kill["lost"])
    return [
        f"## {report['title'][0].upper()}{report['title'][1:]}",
        "",
        f"`{command}`: {len(kills)} kills of a run of {report['max_steps']} steps, saved after "
        f"every {report['save_every']} and evaluated after every {report['eval_every']}. "
        f"{report['machine']}; {report['note']} Commit {report['commit']}.",
        "",
        f"Compared with the undisturbed run, bit for bit: {compared}. After the kills "
        f"{sum(kill['damaged'] for kill in kills)} checkpoints were damaged; those of "
        f"{checked} kills were compared with the undisturbed run's of the same step, and "
        f"{sum(bool(kill['different']) for kill in kills)} differed. Left in the cache: "
        f"{', '.join(report['different']['cache']) or 'nothing'}.",
        "",
        *_save_lines(report["save"]),
        "| where | kills | steps to do again |",
        "|---|---|---|",
        *(
            f"| {where} | {len(lost)} | {sum(lost)} |"
            for where, lost in sorted(places.items(), key=lambda item: -len(item[1]))
        ),
        f"| in all | {len(kills)} | {sum(kill['lost'] for kill in kills)} |",
        "",
        "| kill | started from | after | where | done | saved | steps to do again |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {kill['number']} | {_started(kill)} | {kill['seconds']:.1f} s | {kill['where']} | "
            f"{kill['step']} | {kill['saved']} | {kill['lost']} |"
            for kill in kills
        ),
    ]


def _started(kill: dict[str, Any]) -> str:
    from_step = kill["resumed_from_step"]
    return "the start" if from_step is None else f"step {from_step}"


def _save_lines(save: dict[str, Any] | None) -> list[str]:
    if save is None:
        return []
    low, median, high = save["seconds"]
    return [
        f"A checkpoint is {save['bytes'] / 1e6:.1f} MB. A save (written, flushed, read back, an "
        f"older one removed) takes {median:.2f} s ({low:.2f} to {high:.2f}), "
        f"{save['cpu_seconds']:.2f} s of the processor: {save['share_at_one_a_minute']:.1%} of a "
        f"run that saves once a minute. Within the run a step takes {save['step_seconds']:.2f} s, "
        f"and one that is saved {save['step_and_save_seconds']:.2f} s (medians).",
        "",
    ]
