"""Arms of a run, compared from what they left behind and nothing else.

Outcomes are joined by sample id. Arms that were not judged alike are refused. Regenerating a comparison gives
the same bytes: intervals are seeded, and nothing in it depends on the hour.
"""

import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch

from evidence_ft.drawing import Drawing, Shown, behaviour, curves, gallery, percent
from evidence_ft.evidence import VALID_FROM
from evidence_ft.files import RunFileError, named, to_json, write_atomically
from evidence_ft.metrics import Interval, RatioStatistic, percentile_interval, replicate
from evidence_ft.outcomes import Gallery, Outcomes, summarise
from evidence_ft.runs import METRICS_FILE, RECORD_FILE, RunRecord, read_steps

ARM_ORDER = ("zero_shot", "baseline", "evidence", "swap", "evidence_swap")
"""Arms of these names come first, in this order; others follow by name."""
REFERENCE = "baseline"
"""The arm the others are compared with; without it, the first."""

_MEANT = ("evidence.weight", "training.background_swap")  # what arms differ in on purpose
_PROMPTS = ("method.templates",)  # of the method's settings, what an arm that was not trained has too
_SHOWN = 5  # settings that a warning names before it only counts

_RATES = ("accuracy", "PT", "IR", "RR", "mean_RMA", "swapped_accuracy")
_LABELS = {
    "accuracy": "Accuracy",
    "PT": "PT",
    "IR": "IR",
    "RR": "RR",
    "mean_RMA": "Mean RMA",
    "uniform_PT": "PT floor",
    "swapped_accuracy": "Swapped background",
    "empty_heatmaps": "Empty maps",
    "n": "Images",
    "n_annotated": "With evidence",
}


@dataclass(frozen=True)
class Arm:
    """One arm as it was left behind.

    Attributes:
        directory: its directory.
        record: its run record.
        outcomes: for each test split, rows in the order of the first arm's.
        steps: what was logged in training; empty where nothing was trained.
        gallery: for each test split with a gallery, its images by sample id.
    """

    directory: Path
    record: RunRecord
    outcomes: dict[str, Outcomes]
    steps: list[dict[str, float]] = field(default_factory=list)
    gallery: dict[str, dict[str, Shown]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.record.arm


@dataclass(frozen=True)
class Comparison:
    """Arms side by side.

    Attributes:
        name: of the run.
        arms: in the order of the report.
        reference: the arm that differences are taken against; None without arms.
        threshold: RMA from which a rationale counts as right.
        numbers: arm, split, name to number; rates as shares, NaN where undefined.
        differences: ``"<arm> - <reference>"``, split, rate to the interval of the difference.
        verdicts: for each split, what the differences show, in words.
    """

    name: str
    arms: tuple[Arm, ...]
    reference: str | None
    threshold: float
    numbers: dict[str, dict[str, dict[str, Any]]]
    differences: dict[str, dict[str, dict[str, Interval]]]
    verdicts: dict[str, tuple[str, ...]]

    @property
    def splits(self) -> tuple[str, ...]:
        """Test splits; the same for all arms."""
        return tuple(self.arms[0].outcomes) if self.arms else ()

    def to_json(self) -> str:
        """What ``comparison.json`` holds."""
        differences = {
            pair: {
                split: {rate: _rounded(interval) for rate, interval in rates.items()} for split, rates in splits.items()
            }
            for pair, splits in self.differences.items()
        }
        return to_json({"arms": self.numbers, "differences": differences})


def compare(directory: Path, arms: Sequence[str] | None = None) -> Comparison:
    """Compare the arms of a run, from their directories alone.

    Args:
        directory: of the run; each arm has a directory in it.
        arms: their names, in the order of the report; by default all that have finished.

    Returns:
        With differences against the arm named ``baseline``, or the first. Their 95 % intervals come from a
        paired bootstrap of the test images; they say nothing of other training seeds.

    Raises:
        RunFileError: arms were not judged on the same images in the same way; the first few ids or the keys are
            named. Or a file is missing or broken, and named.
    """
    names = _finished(directory) if arms is None else list(arms)
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise RunFileError(f"arms {named(twice)} are named more than once")
    read = [_read_arm(directory / name) for name in names]
    for arm in read[1:]:
        _check_judged_alike(read[0], arm)
    read = [_aligned(arm, read[0]) for arm in read]
    threshold = float(_evaluation(read[0]).get("threshold", VALID_FROM)) if read else VALID_FROM
    reference = None if not names else REFERENCE if REFERENCE in names else names[0]
    numbers: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    differences: dict[str, dict[str, dict[str, Interval]]] = {
        f"{name} - {reference}": {} for name in names if name != reference
    }
    for split in read[0].outcomes if read else ():
        outcomes = {arm.name: arm.outcomes[split] for arm in read}
        intervals, against = _intervals(outcomes, reference, threshold)
        for name in names:
            numbers[name][split] = _numbers(outcomes[name], intervals[name], threshold)
        for name, rates in against.items():
            differences[f"{name} - {reference}"][split] = rates
    return Comparison(
        name=read[0].record.name if read else directory.name,
        arms=tuple(read),
        reference=reference,
        threshold=threshold,
        numbers=numbers,
        differences=differences,
        verdicts={
            split: tuple(_verdicts(split, numbers, differences, reference))
            for split in (read[0].outcomes if read else ())
        },
    )


def write_comparison(directory: Path, arms: Sequence[str] | None = None) -> Comparison:
    """Compare the arms of a run and write ``comparison.json``, ``.md`` and ``.html`` beside them.

    The same arms give the same bytes. The HTML is one file: images, plots and style are in it, and opening it
    asks nothing of any server.

    Args:
        directory: of the run.
        arms: as in `compare`.

    Returns:
        What was written.

    Raises:
        RunFileError: as `compare`; nothing is written then.
    """
    comparison = compare(directory, arms)
    contents = {"json": comparison.to_json(), "md": format_markdown(comparison), "html": format_html(comparison)}
    for suffix, content in contents.items():
        write_atomically(directory / f"comparison.{suffix}", content)
    return comparison


def format_table(comparison: Comparison) -> str:
    """The numbers and verdicts as plain, aligned text for a terminal.

    Example:
        >>> print(format_table(Comparison("toy", (), None, 0.5, {}, {}, {})))
        toy: no finished arms
    """
    if not comparison.arms:
        return f"{comparison.name}: no finished arms"
    blocks = [_aligned_text(_arms_table(comparison.arms))]
    blocks += [f"WARNING: {warning}" for warning in _warnings(comparison)]
    for split in comparison.splits:
        header, *rows = _overview(comparison, split)
        blocks.append("\n".join([f"{comparison.name}, {split} (per cent)", _aligned_text([header, *rows])]))
        if comparison.differences:
            blocks.append(
                "\n".join(
                    [
                        "difference in points [95 % interval]",
                        _aligned_text(_difference_table(comparison, split)),
                    ]
                )
            )
        blocks.append("\n".join(comparison.verdicts[split]))
    return "\n\n".join(block for block in blocks if block)


def format_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: verdicts, tables, what differs in the settings."""
    if not comparison.arms:
        return f"# {_cell(comparison.name)}\n\nNo finished arms.\n"
    parts = [f"# {_cell(comparison.name)}", _markdown_table(_arms_table(comparison.arms))]
    parts += [f"**Warning:** {_cell(warning)}" for warning in _warnings(comparison)]
    for split in comparison.splits:
        parts += [f"## {_cell(split)}", *map(_cell, comparison.verdicts[split])]
        parts.append(_markdown_table(_overview(comparison, split)))
        if comparison.differences:
            parts += [
                "Difference in points, with the 95 % interval of a paired bootstrap over the test images:",
                _markdown_table(_difference_table(comparison, split)),
            ]
    parts += [
        "## How to read this",
        *(f"- **{term}**: {text}" for term, text in _legend(comparison.threshold)),
    ]
    notes = _notes(comparison)
    if notes:
        parts += ["## Notes", *(f"- {_cell(note)}" for note in notes)]
    settings = _differing_settings(comparison.arms)
    parts += [
        "## What differs in the settings",
        _markdown_table(settings) if len(settings) > 1 else "Nothing.",
    ]
    parts += ["## Data", _markdown_table(_data_table(comparison.arms))]
    text = "\n\n".join(parts)
    # Items of one list stand together.
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text) + "\n"


def format_html(comparison: Comparison) -> str:
    """The comparison as one self-contained HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evidence_ft", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    arms = comparison.arms
    return environment.get_template("comparison.html.j2").render(
        name=comparison.name,
        arms=[arm.name for arm in arms],
        described=_arms_table(arms),
        warnings=_warnings(comparison),
        reference=comparison.reference,
        threshold=comparison.threshold,
        explained=_evaluation(arms[0]).get("explain", "label") if arms else "label",
        legend=_legend(comparison.threshold),
        notes=_notes(comparison),
        splits=[
            {
                "name": split,
                "verdicts": comparison.verdicts[split],
                "overview": _overview(comparison, split),
                "differences": _difference_table(comparison, split) if comparison.differences else [],
                "figures": _figures(comparison, split),
                "gallery": _gallery(comparison, split),
            }
            for split in comparison.splits
        ],
        curves=list(curves({arm.name: arm.steps for arm in arms})),
        settings=_differing_settings(arms),
        data=_data_table(arms),
        skipped=_skipped(arms),
        details=[(arm.name, _details(arm)) for arm in arms],
    )


def _figures(comparison: Comparison, split: str) -> list[Drawing]:
    assert comparison.reference is not None  # only a comparison without arms has none, and it has no splits
    outcomes = {arm.name: arm.outcomes[split] for arm in comparison.arms}
    key = f"split-{comparison.splits.index(split)}"
    return list(behaviour(key, outcomes, reference=comparison.reference, threshold=comparison.threshold))


def _gallery(comparison: Comparison, split: str) -> list[dict[str, Any]]:
    outcomes = {arm.name: arm.outcomes[split] for arm in comparison.arms}
    shown = {arm.name: images for arm in comparison.arms if (images := arm.gallery.get(split))}
    return gallery(outcomes, shown, threshold=comparison.threshold)


# Reading


def _finished(directory: Path) -> list[str]:
    names = [path.parent.name for path in directory.glob(f"*/{RECORD_FILE}")]
    rank = {name: position for position, name in enumerate(ARM_ORDER)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


def _read_arm(directory: Path) -> Arm:
    record = RunRecord.read(directory)
    if record.arm != directory.name:
        raise RunFileError(f"{directory / RECORD_FILE} is of arm {record.arm!r}, expected {directory.name!r}")
    outcomes = {split: record.read_outcomes(directory, split) for split in record.outcomes}
    metrics_file = directory / METRICS_FILE
    return Arm(
        directory=directory,
        record=record,
        outcomes=outcomes,
        steps=read_steps(metrics_file) if metrics_file.exists() else [],
        gallery={
            split: _read_gallery(path, outcomes[split])
            for split in outcomes
            if (path := directory / "gallery" / f"{split}.safetensors").exists()
        },
    )


def _read_gallery(path: Path, outcomes: Outcomes) -> dict[str, Shown]:
    gallery = Gallery.read(path)
    rows = gallery.rows.tolist()
    if outside := [row for row in rows if not 0 <= row < outcomes.n]:
        raise RunFileError(f"gallery {path} shows row {outside[0]}, but the outcomes have {outcomes.n} rows")
    arrays = zip(gallery.images.numpy(), gallery.masks.numpy(), gallery.heatmaps.numpy(), strict=True)
    return {outcomes.sample_ids[row]: Shown(*shown) for row, shown in zip(rows, arrays, strict=True)}


def _evaluation(arm: Arm) -> dict[str, Any]:
    return dict(arm.record.config.get("evaluation") or {})


def _check_judged_alike(first: Arm, other: Arm) -> None:
    """Refuse two arms whose difference would not be one of the models alone."""
    pair = f"arms {first.name!r} and {other.name!r} cannot be compared"
    settings = [dict(_flattened(_evaluation(arm), "evaluation")) for arm in (first, other)]
    keys = sorted(settings[0].keys() | settings[1].keys())
    if differing := [key for key in keys if settings[0].get(key) != settings[1].get(key)]:
        values = "; ".join(f"{key} is {settings[0].get(key)!r} and {settings[1].get(key)!r}" for key in differing)
        raise RunFileError(f"{pair}: they were judged differently: {values}; evaluate them with the same settings")
    if set(first.outcomes) != set(other.outcomes):
        raise RunFileError(f"{pair}: test splits are {named(first.outcomes)} and {named(other.outcomes)}")
    for split in first.outcomes:
        _check_same_images(f"{pair} on {split!r}", split, first, other)


def _check_same_images(pair: str, split: str, first: Arm, other: Arm) -> None:
    ours, theirs = first.outcomes[split], other.outcomes[split]
    if ours.class_names != theirs.class_names:
        raise RunFileError(f"{pair}: class names are {named(ours.class_names)} and {named(theirs.class_names)}")
    if set(ours.sample_ids) != set(theirs.sample_ids):
        only_ours = sorted(set(ours.sample_ids) - set(theirs.sample_ids))
        only_theirs = sorted(set(theirs.sample_ids) - set(ours.sample_ids))
        raise RunFileError(
            f"{pair}: only {first.name!r} has {named(only_ours)}, only {other.name!r} has {named(only_theirs)}"
        )
    theirs = theirs.in_order_of(ours.sample_ids)
    same = {
        "labels": ours.labels == theirs.labels,
        "masks": torch.isclose(ours.mask_share, theirs.mask_share, atol=1e-4, equal_nan=True),
        "swapped images": ours.swapped_correct.isnan() == theirs.swapped_correct.isnan(),
    }
    for what, agree in same.items():
        if differing := [s for s, ok in zip(ours.sample_ids, agree.tolist(), strict=True) if not ok]:
            raise RunFileError(f"{pair}: {what} differ for {named(differing)}")
    prints = [arm.record.data[split].fingerprint if split in arm.record.data else None for arm in (first, other)]
    if prints[0] != prints[1]:
        raise RunFileError(f"{pair}: fingerprints of the test data are {prints[0]!r} and {prints[1]!r}")


def _aligned(arm: Arm, first: Arm) -> Arm:
    aligned = {split: arm.outcomes[split].in_order_of(table.sample_ids) for split, table in first.outcomes.items()}
    return Arm(arm.directory, arm.record, aligned, arm.steps, arm.gallery)


# Numbers


def _intervals(
    outcomes: Mapping[str, Outcomes], reference: str | None, threshold: float
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Intervals of each arm's rates and of their differences from the reference's, from the same draws."""
    rates: dict[tuple[str, str], RatioStatistic] = {
        (arm, rate): statistic
        for arm, table in outcomes.items()
        for rate, statistic in table.ratio_statistics(threshold).items()
    }
    drawn = replicate(rates) if min(table.n for table in outcomes.values()) else {}
    nothing = torch.full((1,), torch.nan)
    alone = {
        arm: {r: percentile_interval(rates[arm, r].value, drawn.get((arm, r), nothing)) for r in _RATES}
        for arm in outcomes
    }
    against = {
        arm: {
            r: percentile_interval(
                rates[arm, r].value - rates[reference, r].value,
                drawn[arm, r] - drawn[reference, r] if drawn else nothing,
            )
            for r in _RATES
        }
        for arm in outcomes
        if reference is not None and arm != reference
    }
    return alone, against


def _numbers(outcomes: Outcomes, intervals: Mapping[str, Interval], threshold: float) -> dict[str, Any]:
    summary = summarise(outcomes, threshold)
    counts = outcomes.rationality(threshold)
    return {
        "n": summary["n"],
        "accuracy": summary["accuracy"],
        "PT": summary["PT"],
        "IR": summary["IR"],
        "RR": summary["RR_share"],
        "mean_RMA": summary["mean_RMA"],
        "empty_heatmaps": summary["empty_heatmaps"],
        "swapped_accuracy": summary["swapped_accuracy"],
        "n_annotated": summary["n_annotated"],
        "swapped_n": summary["swapped_n"],
        "uniform_PT": summary["uniform_PT"],
        "quadrants": counts._asdict(),
        "intervals": {
            rate: [_rounded(interval)[end] for end in ("low", "high")] for rate, interval in intervals.items()
        },
    }


def _rounded(interval: Interval) -> dict[str, Any]:
    # The last digits of a sum depend on the number of threads; the estimate is kept as it is.
    return interval._asdict() | {"low": round(interval.low, 6), "high": round(interval.high, 6)}


# Words


def _verdicts(
    split: str,
    numbers: Mapping[str, Any],
    differences: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    reference: str | None,
) -> Iterable[str]:
    arms = [name for name in numbers if name != reference]
    if reference is not None and not arms:
        yield f"On {split}: there is one arm, {reference}, and nothing to compare it with."
    trained = [name for name in arms if name != ARM_ORDER[0]] or arms
    for name in trained:
        rates = differences[f"{name} - {reference}"][split]
        yield f"On {split}, {name} against {reference}: {verdict(rates)}"


def verdict(rates: Mapping[str, Interval]) -> str:
    """What the differences between two arms show and what they do not, in one sentence.

    A change is claimed where its interval lies on one side of 0, and nowhere else. "Not shown" is not "absent".

    Args:
        rates: intervals of the differences in ``accuracy``, ``PT``, ``IR``, ``RR`` and ``swapped_accuracy``, as shares.

    Example:
        >>> verdict(
        ...     {
        ...         "PT": Interval(0.45, 0.38, 0.52),
        ...         "IR": Interval(-0.01, -0.05, 0.03),
        ...         "RR": Interval(0.4, 0.33, 0.47),
        ...         "accuracy": Interval(0.0, -0.02, 0.02),
        ...         "swapped_accuracy": Interval(0.03, -0.02, 0.08),
        ...     }
        ... ).split(": ")[-1]
        'the maps moved onto the evidence; behaviour on swapped backgrounds is not shown to follow.'
    """
    shown = {
        "PT": "PT",
        "RR": "RR",
        "accuracy": "accuracy",
        "swapped_accuracy": "accuracy on swapped backgrounds",
    }
    figures = "; ".join(
        f"{label} {_points(rates[rate])}" for rate, label in shown.items() if not math.isnan(rates[rate].estimate)
    )
    claims = [_maps(rates["PT"], rates["RR"]), _behaviour(rates), *_changes(rates)]
    return f"{figures or 'no rate is defined in both arms'}: {'; '.join(claims)}."


def _maps(PT: Interval, RR: Interval) -> str:
    if math.isnan(PT.low):
        return "too few right predictions with evidence to speak of the maps"
    if PT.above_zero and RR.above_zero:
        return "the maps moved onto the evidence"
    if PT.above_zero:
        return "PT rose, but more images right for the right reason are not shown"
    if PT.below_zero:
        return "the maps of right predictions moved off the evidence"
    return "no change of the maps is shown"


def _behaviour(rates: Mapping[str, Interval]) -> str:
    swapped, moved = rates["swapped_accuracy"], rates["PT"].above_zero
    if math.isnan(swapped.low):
        return "behaviour on swapped backgrounds was not measured"
    if swapped.above_zero:
        return f"accuracy on swapped backgrounds rose{' with them' if moved else ''}"
    if swapped.below_zero:
        return "accuracy on swapped backgrounds fell"
    return f"behaviour on swapped backgrounds is not shown to {'follow' if moved else 'change'}"


def _changes(rates: Mapping[str, Interval]) -> Iterable[str]:
    for rate in ("accuracy", "IR"):
        if rates[rate].above_zero:
            yield f"{rate} rose"
        if rates[rate].below_zero:
            yield f"{rate} fell"


def _legend(threshold: float) -> list[tuple[str, str]]:
    terms = {
        "RMA": "relevance mass accuracy, the share of a heatmap's mass that lies on the evidence mask.",
        "Right rationale": f"RMA of at least {threshold:g}. An empty heatmap is never right; an image without evidence "
        "is left out.",
        "RR, RW, WR, WW": "images counted by prediction (first letter, right or wrong) and rationale (second letter). "
        "As a rate, RR is the share that is right for the right reason.",
        "PT": "prediction trustworthiness, RR / (RR + RW): of right predictions, those with a right rationale.",
        "IR": "inference reliability, RR / (RR + WR): of right rationales, those with a right prediction.",
        "PT floor": "the PT of a heatmap that is the same everywhere: what large masks alone would give.",
        "Swapped background": "accuracy on the same objects in front of the background of another image.",
        "Background swap": "share of the training images whose object stood on another one's painted-out background.",
        "Interval": "95 %, from 10,000 draws of the test images, the same for all arms. It covers the choice of test "
        "images, not another training seed.",
    }
    return list(terms.items())


def _notes(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the tables."""
    notes = []
    for arm in comparison.arms:
        evidence, evaluation = arm.record.config.get("evidence") or {}, _evaluation(arm)
        same = all(key in evidence and evidence[key] == evaluation.get(key) for key in ("heatmap", "layers"))
        if arm.record.training and evidence.get("weight") and same:
            notes.append(
                f"{arm.name} was trained through the very map it is judged by ({evaluation['heatmap']}, layers "
                f"{_value(evaluation['layers'])}); that this map moved is expected, and not by itself a better model."
            )
        for split, outcomes in arm.outcomes.items():
            if outcomes.empty_heatmaps:
                notes.append(
                    f"{arm.name} has {outcomes.empty_heatmaps} empty heatmaps of {outcomes.n} on {split}; "
                    "with evidence they count as wrong rationales."
                )
    notes += [
        f"On {split} no object can be shown on the background of another class: accuracy on swapped backgrounds is not "
        "defined. It needs annotated images of two classes."
        for split in comparison.splits
        if not any(arm.outcomes[split].swapped_n for arm in comparison.arms)
    ]
    notes += _unseen_classes(comparison.arms)
    if skipped := len(_skipped(comparison.arms)) - 1:
        left_out = "1 sample was" if skipped == 1 else f"{skipped} samples were"
        notes.append(f"{left_out} left out as unusable; {RECORD_FILE} says which and why.")
    return notes


def _unseen_classes(arms: Sequence[Arm]) -> list[str]:
    trained_on = [
        (split, data)
        for arm in arms
        if arm.record.training
        and (split := (arm.record.config.get("data") or {}).get("train_split"))
        and (data := arm.record.data.get(split))
    ]
    found = [
        f"No image of {split} shows {named(data.classes_without_images, 20)}: nothing was learnt of it."
        for split, data in trained_on
        if data.classes_without_images
    ]
    return list(dict.fromkeys(found))


def _warnings(comparison: Comparison) -> list[str]:
    """Differences between arms that no arm is meant to make: with these, the tables compare something else."""
    # A trained arm first: with one that was not trained, others can only be compared in part.
    arms = sorted(comparison.arms, key=lambda arm: not arm.record.training)
    found = []
    for other in arms[1:]:
        ours, theirs = _identity(arms[0]), _identity(other)
        both_trained = arms[0].record.training and other.record.training
        keys = ours | theirs if both_trained else [key for key in ours if key in theirs]
        if differing := [key for key in keys if ours.get(key) != theirs.get(key)]:
            values = "; ".join(
                f"{key} is {_value(ours.get(key))} and {_value(theirs.get(key))}" for key in differing[:_SHOWN]
            )
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            found.append(
                f"arms {arms[0].name} and {other.name} differ in more than they mean to: {values}{more}. Not all "
                "that is between them comes from the arms; run them again with the same settings."
            )
    return found


def _identity(arm: Arm) -> dict[str, Any]:
    """What an arm must have in common with others. How they are judged is not part of it: that is refused."""
    record = arm.record
    settings = {
        key: value
        for key, value in _settings(arm).items()
        if key not in _MEANT and not key.startswith(("run.", "evaluation."))
    }
    seen = {
        f"images of {split}": data.fingerprint[:12]
        for split, data in record.data.items()
        if record.training or split in record.results
    }
    identity = settings | seen | {"start weights": record.model.get("sha256")}
    if not record.training:
        return identity
    return identity | {"seed": record.seed, "processes": record.environment.get("num_processes")}


def _settings(arm: Arm) -> dict[str, Any]:
    """An arm's settings by their dotted keys, without those that only training reads where nothing was trained."""
    settings = dict(_flattened(arm.record.config))
    if arm.record.training:
        return settings
    of_training = ("evidence.", "method.", "training.")
    return {key: value for key, value in settings.items() if key in _PROMPTS or not key.startswith(of_training)}


# Tables: a list of rows, the header first, everything already text


def _arms_table(arms: Sequence[Arm]) -> list[list[str]]:
    """What each arm was: method, weight, swap."""
    rows = [["Arm", "Method", "Evidence weight", "Background swap", "Seed", "Steps"]]
    for arm in arms:
        config, training = arm.record.config, arm.record.training
        of_training = [_value((config.get("evidence") or {}).get("weight"))]
        of_training += [_value((config.get("training") or {}).get("background_swap", 0.0))]
        of_training += [str(arm.record.seed), _value((training or {}).get("steps"))]
        method = _value((config.get("method") or {}).get("name"))
        share = _evaluation(arm).get("interpolation", 1.0)
        mixed = f", {percent(share)} % tuned" if training and share < 1 else ""
        rows.append([arm.name, method + mixed, *(of_training if training else ["\N{EN DASH}"] * 4)])
    return rows


def _overview(comparison: Comparison, split: str) -> list[list[str]]:
    counts = ("empty_heatmaps", "n", "n_annotated")
    rates = ("accuracy", "PT", "IR", "RR", "mean_RMA", "uniform_PT", "swapped_accuracy")
    rows = [["Arm", *(_LABELS[key] for key in (*rates, *counts))]]
    for name, splits in comparison.numbers.items():
        numbers = splits[split]
        rows.append([name, *(percent(numbers[key]) for key in rates), *(str(numbers[key]) for key in counts)])
    return rows


def _difference_table(comparison: Comparison, split: str) -> list[list[str]]:
    rows = [["Arm", *(_LABELS[rate] for rate in _RATES)]]
    for pair, splits in comparison.differences.items():
        rows.append(
            [
                pair.replace(" - ", " \N{MINUS SIGN} "),
                *(_points(splits[split][rate], unit="") for rate in _RATES),
            ]
        )
    return rows


def _differing_settings(arms: Sequence[Arm]) -> list[list[str]]:
    flat = [_settings(arm) | {"seed": arm.record.seed} for arm in arms]
    # Each arm's configuration lists the arm itself, which says nothing.
    keys = [key for key in dict.fromkeys(key for settings in flat for key in settings) if key != "run.arms"]
    rows = [["Key", *(arm.name for arm in arms)]]
    for key in keys:
        values = [_value(settings[key]) if key in settings else "\N{EN DASH}" for settings in flat]
        # That an arm which was not trained lacks a setting of training is no difference.
        pairs = zip(arms, flat, values, strict=True)
        if len({value for arm, settings, value in pairs if arm.record.training or key in settings}) > 1:
            rows.append([key, *values])
    return rows


def _data_table(arms: Sequence[Arm]) -> list[list[str]]:
    rows = [
        [
            "Arm",
            "Split",
            "Images",
            "Annotated",
            "Mask / box / none",
            "No evidence in view",
            "Left out",
            "Fingerprint",
        ]
    ]
    for arm in arms:
        for split, data in arm.record.data.items():
            sources, out_of_view = "\N{EN DASH}", "\N{EN DASH}"
            if split in arm.outcomes:
                outcomes = arm.outcomes[split]
                count = Counter(outcomes.mask_sources)
                sources = f"{count['mask']} / {count['box']} / {count['none']}"
                out_of_view = str(outcomes.n - count["none"] - outcomes.n_annotated)
            rows.append(
                [
                    arm.name,
                    split,
                    str(data.n),
                    str(data.annotated),
                    sources,
                    out_of_view,
                    str(len(data.skipped)),
                    data.fingerprint[:12],
                ]
            )
    return rows


def _skipped(arms: Sequence[Arm]) -> list[list[str]]:
    rows = [["Split", "Sample", "Reason", "Arms"]]
    by_sample: dict[tuple[str, str, str], list[str]] = {}
    for arm in arms:
        for split, data in arm.record.data.items():
            for sample in data.skipped:
                by_sample.setdefault((split, sample.sample_id, sample.reason), []).append(arm.name)
    return rows + [[*key, ", ".join(names)] for key, names in sorted(by_sample.items())]


def _details(arm: Arm) -> list[tuple[str, list[list[str]]]]:
    record = arm.record
    parts: dict[str, Mapping[str, Any]] = {
        "Model": record.model,
        "Training": record.training or {"training": "none"},
        "Environment": record.environment,
        "Settings": {"seed": record.seed, **record.config},
    }
    return [(title, [[key, _value(value)] for key, value in _flattened(values)]) for title, values in parts.items()]


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of a nested mapping by their dotted keys."""
    for key, value in tree.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, dotted)
        else:
            yield dotted, value


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _points(interval: Interval, unit: str = " points") -> str:
    if math.isnan(interval.estimate):
        return "\N{EN DASH}"
    bounds = "no interval" if math.isnan(interval.low) else f"{_signed(interval.low)}, {_signed(interval.high)}"
    return f"{_signed(interval.estimate)}{unit} [{bounds}]"


def _signed(share: float) -> str:
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}".replace("-", "\N{MINUS SIGN}") if rounded else "0.0"


def _aligned_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if position == 0 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    rule = "|" + "|".join([":--", *["--:"] * (len(rows[0]) - 1)]) + "|"
    return "\n".join([header, rule, *body])


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
