"""The pictures of a comparison: figures as inline SVG, images with their heatmaps.

Drawing the same twice gives the same bytes. This module knows nothing of arms, records or settings: it draws
the outcomes, steps and images that it is given by name.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from evidence_ft.metrics import Rationality
from evidence_ft.outcomes import Outcomes
from evidence_ft.types import OBJECT

_THUMBNAIL_PX = 224
_GALLERY_LIMIT = 24
_SMOOTHED_FROM = 60
_INK, _MUTED = "#1b1f24", "#5b6570"
_QUADRANTS = {"RR": "#1b7f5c", "RW": "#e0a100", "WR": "#8a5fbf", "WW": "#8b949e"}
_LINES = (("#6b7280", ":"), ("#0b66c3", "--"), ("#c2410c", "-"), ("#1b7f5c", "-."), ("#8a3ffc", "-"))

Pixels = npt.NDArray[np.uint8]


class Shown(NamedTuple):
    """An image of a gallery, with its mask ``(Hpx, Wpx)`` and heatmap ``(h, w)``."""

    image: Pixels
    mask: Pixels
    heatmap: npt.NDArray[np.float32]


class Drawing(NamedTuple):
    """A figure of the page: inline SVG, with a caption and a text for those who do not see it."""

    svg: Markup
    caption: str
    description: str


# Figures


def curves(steps: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterable[Drawing]:
    """What was logged in training, one figure a quantity; none for what no arm has logged.

    Args:
        steps: for each arm, its logged steps; its place is its colour in all figures.
    """
    quantities = {
        "task_loss": "Task loss",
        "evidence_loss": "Evidence loss",
        "evidence_to_task_gradient_ratio": "Evidence / task gradient",
    }
    for quantity, label in quantities.items():
        logged = {arm: _logged(of_arm, quantity) for arm, of_arm in steps.items()}
        if any(logged.values()):
            yield _curve(f"curve-{quantity.replace('_', '-')}", label, logged)


def _logged(steps: Sequence[Mapping[str, float]], quantity: str) -> list[tuple[float, float]]:
    return [(step["step"], step[quantity]) for step in steps if math.isfinite(step.get(quantity, math.nan))]


def _curve(key: str, label: str, logged: Mapping[str, list[tuple[float, float]]]) -> Drawing:
    def draw(axes: Any) -> None:
        for position, (arm, points) in enumerate(logged.items()):
            if not points:
                continue
            steps, values = np.array(points).T
            axes.plot(steps, values, color=_line(position)["color"], alpha=0.25, linewidth=0.8)
            marker = "o" if len(points) == 1 else None
            axes.plot(steps, _smoothed(values), label=arm, linewidth=1.8, marker=marker, **_line(position))
        axes.set(xlabel="Step", ylabel=label)
        _legend_above(axes)

    long = any(len(points) >= _SMOOTHED_FROM for points in logged.values())
    ends = (f"{arm} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for arm, points in logged.items() if points)
    return Drawing(
        _draw(key, draw),
        f"{label} by step" + (", running mean before the values themselves." if long else "."),
        f"{label} by step: {', '.join(ends)}.",
    )


def _smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Running mean over a thirtieth of the steps; a short curve is left as it is."""
    if len(values) < _SMOOTHED_FROM:
        return values
    width = len(values) // 30 | 1
    counted = np.convolve(np.ones_like(values), np.ones(width), "same")
    return np.asarray(np.convolve(values, np.ones(width), "same") / counted)


def behaviour(key: str, outcomes: Mapping[str, Outcomes], *, reference: str, threshold: float) -> Iterable[Drawing]:
    """How predictions and rationales of one split turned out: their quadrants, and PT by threshold.

    Args:
        key: of the split among the page's figures, unique.
        outcomes: of each arm, in the order of the report.
        reference: the arm whose right predictions a uniform heatmap is judged by.
        threshold: RMA from which a rationale counts as right.
    """
    yield _quadrants(f"{key}-quadrants", {arm: table.rationality(threshold) for arm, table in outcomes.items()})
    yield _PT_by_threshold(f"{key}-thresholds", outcomes, outcomes[reference], threshold)


def _quadrants(key: str, rationality_of: Mapping[str, Rationality]) -> Drawing:
    counts = {arm: rationality._asdict() for arm, rationality in rationality_of.items()}

    def draw(axes: Any) -> None:
        left = np.zeros(len(counts))
        for quadrant, color in _QUADRANTS.items():
            shares = np.array([of[quadrant] / max(1, sum(of.values())) for of in counts.values()])
            axes.barh(
                range(len(counts)), shares, left=left, height=0.62, color=color, edgecolor="white", label=quadrant
            )
            for row, share in enumerate(shares):
                if share >= 0.06:
                    ink = _INK if quadrant in ("RW", "WW") else "white"
                    axes.text(left[row] + share / 2, row, f"{100 * share:.0f}", color=ink, ha="center", va="center")
            left += shares
        axes.set_yticks(range(len(counts)), list(counts))
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="Share of images with evidence")
        axes.grid(visible=False)
        _legend_above(axes, columns=4)

    described = "; ".join(f"{arm}: " + ", ".join(f"{q} {n}" for q, n in of.items()) for arm, of in counts.items())
    return Drawing(
        _draw(key, draw, height=1.2 + 0.5 * len(counts)),
        "Predictions (first letter) and rationales (second letter), right or wrong, in per cent.",
        f"Images with evidence by quadrant. {described}.",
    )


def _PT_by_threshold(key: str, outcomes: Mapping[str, Outcomes], reference: Outcomes, threshold: float) -> Drawing:
    def draw(axes: Any) -> None:
        thresholds = [float(t) for t in np.linspace(0.02, 1.0, 99)]
        for position, (arm, table) in enumerate(outcomes.items()):
            curve = [table.rationality(t).PT for t in thresholds]
            axes.plot(thresholds, curve, label=arm, linewidth=1.8, **_line(position))
        floor = [reference.uniform_PT(t) for t in thresholds]
        axes.plot(thresholds, floor, label="uniform map", color="#9aa3ad", linewidth=1.2)
        axes.axvline(threshold, color=_INK, linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="RMA threshold", ylabel="PT")
        _legend_above(axes)

    values = ", ".join(f"{arm} {percent(table.rationality(threshold).PT)} %" for arm, table in outcomes.items())
    return Drawing(
        _draw(key, draw),
        f"PT by the RMA that counts as right; the line marks {threshold:g}. An arm that is ahead at one threshold "
        "only is not ahead.",
        f"PT at threshold {threshold:g}: {values}.",
    )


def percent(share: float) -> str:
    """Per cent with one digit; a dash where the share is undefined.

    Example:
        >>> percent(2 / 3), percent(math.nan)
        ('66.7', '–')
    """
    return "\N{EN DASH}" if math.isnan(share) else f"{100 * share:.1f}"


def _draw(key: str, draw: Callable[[Any], None], *, height: float = 2.9) -> Markup:
    """An axes, drawn on and saved as SVG that is the same whenever it is drawn.

    Args:
        key: of the page's figures, unique: it keeps their ids apart.
        draw: called with the axes.
        height: in inches.
    """
    style = {
        "svg.hashsalt": key,
        "svg.fonttype": "none",  # text stays text: it can be read, searched and selected
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "text.color": _INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e7eb",
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.0, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    # Inside HTML an SVG needs neither prologue nor namespaces.
    svg = re.sub(r'(?s)^.*?(?=<svg)|<metadata>.*?</metadata>\s*| xmlns(:xlink)?="[^"]*"', "", file.getvalue())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def _legend_above(axes: Any, columns: int | None = None) -> None:
    entries = len(axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside upper left", ncols=columns or (entries if entries <= 3 else 2), fontsize=9)


def _line(position: int) -> dict[str, Any]:
    color, style = _LINES[position % len(_LINES)]
    return {"color": color, "linestyle": style}


# Gallery


def gallery(
    outcomes: Mapping[str, Outcomes], shown: Mapping[str, Mapping[str, Shown]], *, threshold: float
) -> list[dict[str, Any]]:
    """The images that every arm with a gallery has kept, with each arm's heatmap.

    Args:
        outcomes: of each arm, with rows in the same order.
        shown: for each arm with a gallery, its images by sample id.
        threshold: RMA from which a rationale counts as right.

    Returns:
        For each image its ``sample_id``, its ``label`` and its ``views``, as the page's template reads them.
    """
    if not shown:
        return []
    first, *others = shown.values()
    kept = [sample_id for sample_id in first if all(sample_id in other for other in others)]
    return [
        _gallery_entry(
            sample_id,
            {arm: (outcomes[arm], images[sample_id]) for arm, images in shown.items()},
            threshold,
        )
        for sample_id in kept[:_GALLERY_LIMIT]
    ]


def _gallery_entry(sample_id: str, arms: Mapping[str, tuple[Outcomes, Shown]], threshold: float) -> dict[str, Any]:
    first, shown = next(iter(arms.values()))
    row = first.sample_ids.index(sample_id)
    label = first.class_names[int(first.labels[row])]
    in_view = bool((shown.mask == OBJECT).any())
    views = [
        {
            "title": "image",
            "picture": _picture(_outlined(*_sized(shown.image, shown.mask))),
            "alt": f"{label}: the image" + (" with the evidence outlined" if in_view else ""),
            "lines": [("", "evidence outlined" if in_view else "no evidence in view")],
        }
    ]
    return {
        "sample_id": sample_id,
        "label": label,
        "views": views + [_view(arm, row, *found, threshold) for arm, found in arms.items()],
    }


def _view(arm: str, row: int, outcomes: Outcomes, shown: Shown, threshold: float) -> dict[str, Any]:
    predicted = outcomes.class_names[int(outcomes.predictions[row])]
    rma, correct = float(outcomes.rma[row]), bool(outcomes.correct[row])
    rationale = "no evidence" if math.isnan(rma) else f"RMA {rma:.2f}"
    mark = "" if math.isnan(rma) else _mark(rma >= threshold)
    empty = not (shown.heatmap > 0).any()
    return {
        "title": arm,
        "picture": _picture(_overlay(*shown)),
        "alt": f"{arm}: {'empty heatmap' if empty else 'heatmap'} over the image; predicts {predicted}, "
        f"{'right' if correct else 'wrong'}; {rationale}",
        "lines": [(_mark(correct), predicted), (mark, rationale + (", empty map" if empty else ""))],
    }


def _mark(is_right: bool) -> str:
    return "\N{CHECK MARK}" if is_right else "\N{BALLOT X}"


def _sized(image: Pixels, mask: Pixels) -> tuple[Pixels, Pixels]:
    """Image and mask at the size of a thumbnail: small ones enlarged by whole pixels."""
    longest = max(image.shape[:2])
    if longest < _THUMBNAIL_PX:
        times = math.ceil(_THUMBNAIL_PX / longest)
        return image.repeat(times, 0).repeat(times, 1), mask.repeat(times, 0).repeat(times, 1)
    size = tuple(max(1, round(side * _THUMBNAIL_PX / longest)) for side in image.shape[1::-1])
    resized = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    return np.asarray(resized), np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _overlay(image: Pixels, mask: Pixels, heatmap: npt.NDArray[np.float32]) -> Pixels:
    """The heatmap, by nearest neighbour, over a grey image; opaque where it is strong."""
    pixels, resized_mask = _sized(image, mask)
    height, width = pixels.shape[:2]
    rows = np.arange(height) * heatmap.shape[0] // height
    columns = np.arange(width) * heatmap.shape[1] // width
    peak = float(heatmap.max(initial=0.0))
    strength = (heatmap / peak if peak > 0 else heatmap)[rows][:, columns]
    colors = mpl.colormaps["inferno"](strength)[..., :3] * 255
    alpha = (0.15 + 0.65 * strength)[..., None] if peak > 0 else np.zeros((height, width, 1))
    grey = pixels.mean(axis=2, keepdims=True)
    blended = (1 - alpha) * grey + alpha * colors
    return _outlined(np.rint(blended).clip(0, 255).astype(np.uint8), resized_mask)


def _outlined(pixels: Pixels, mask: Pixels) -> Pixels:
    """The mask's outline in white, with a dark rim so that it shows on any ground."""
    inside = mask == OBJECT
    rim, outlined = _grown(inside, 1) & ~inside, pixels.copy()
    outlined[rim] = (0, 0, 0)
    outlined[inside & _grown(~inside, 2)] = (255, 255, 255)
    return outlined


def _grown(region: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """A region and its neighbours within some steps."""
    for _ in range(steps):
        padded = np.pad(region, 1)
        region = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return region


def _picture(pixels: Pixels) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=80, method=4)
    encoded = base64.b64encode(file.getvalue()).decode()
    return {
        "source": f"data:image/webp;base64,{encoded}",
        "width": pixels.shape[1],
        "height": pixels.shape[0],
    }
