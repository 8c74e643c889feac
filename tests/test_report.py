"""A comparison, made from directories alone, says what the outcomes say and no more."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from evidence_ft import report
from evidence_ft.files import RunFileError, write_atomically
from evidence_ft.metrics import Interval
from evidence_ft.outcomes import OUTCOMES_SCHEMA, Gallery, Outcomes, summarise
from evidence_ft.runs import DataRecord, RunRecord, SkippedSample, StoredFile

NAN = float("nan")
HOSTILE = "<script>alert('dog')</script>"
IDS = ["a", "b", "c", "d", "e", "f"]
LABELS = [0, 1, 0, 1, 0, 1]
SHARES = [0.6, 0.2, 0.2, 0.2, 0.2, NAN]
SOURCES = ["mask", "box", "mask", "mask", "mask", "none"]

# By hand, of a to e (f has no evidence):
#   baseline  a RR, b RW, c WR, d WW, e RW; f right    accuracy 4/6, PT 1/3, IR 1/2, RR 1/5
#   evidence  a RR, b RR, c RR, d WW, e RW; f wrong    accuracy 4/6, PT 3/4, IR 1,   RR 3/5
BASELINE = {
    "prediction": [0, 1, 1, 0, 0, 1],
    "rma": [0.9, 0.1, 0.7, 0.2, 0.1, NAN],
    "swapped": [0, 0, 0, 0, None, None],  # a and c are right: 2/4
}
EVIDENCE = {
    "prediction": [0, 1, 0, 0, 0, 0],
    "rma": [0.9, 0.5, 0.7, 0.2, 0.0, NAN],
    "heatmap_mass": [1.0, 1.0, 1.0, 1.0, 0.0, 1.0],
    "swapped": [0, 1, 1, 0, None, None],  # a and b are right: 2/4
}
ZERO_SHOT = {"prediction": [1, 1, 1, 1, 1, 1], "rma": [0.1, 0.1, 0.1, 0.1, 0.1, NAN], "swapped": [None] * 6}


def write_arm(
    root,
    arm,
    *,
    prediction,
    rma,
    swapped,
    heatmap_mass=(1.0,) * 6,
    ids=IDS,
    labels=LABELS,
    shares=SHARES,
    order=range(6),
    evaluation=None,
    fingerprint="f" * 64,
    weight=0.0,
    class_names=("cat", HOSTILE),
    splits=("test",),
    gallery=(),
    steps=0,
    skipped=(),
    config=None,
    record=None,
):
    """Leave behind what an arm of six images would."""
    directory = root / arm

    def ordered(values):
        return [values[row] for row in order]

    tables = {}
    for split in splits:
        tables[split] = Outcomes.from_columns(
            sample_id=ordered(ids),
            label=ordered(labels),
            prediction=ordered(prediction),
            confidence=[0.5] * 6,
            rma=ordered(rma),
            mask_share=ordered(shares),
            heatmap_mass=ordered(heatmap_mass),
            mask_source=ordered(SOURCES),
            swapped_prediction=ordered(swapped),
            class_names=class_names,
            split=split,
        )
        tables[split].write(directory / "outcomes" / f"{split}.parquet")
    if gallery:
        write_gallery(directory, [list(ordered(ids)).index(sample_id) for sample_id in gallery], weight)
    if steps:
        logged = [
            {"step": s, "task_loss": 1 / s, "evidence_loss": 0.5, "evidence_to_task_gradient_ratio": None}
            for s in range(1, steps + 1)
        ]
        write_atomically(directory / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in logged))
    settings = {
        "run": {"name": "toy", "arms": [arm]},
        "model": {"checkpoint": "tiny"},
        "method": {"name": "flcp" if steps else "zero_shot", "templates": ["a {}"]},
        "training": {"learning_rate": 0.1, "background_swap": 0.0},
        "evidence": {"heatmap": "gradient_attention", "layers": [-1], "weight": weight},
        "evaluation": {"heatmap": "gradient_attention", "layers": [-1], "explain": "label", "threshold": 0.5}
        | (evaluation or {}),
    } | (config or {})
    whole = RunRecord(
        arm=arm,
        name="toy",
        seed=0,
        config=settings,
        environment={"python": "3.11", "packages": {"torch": "2"}, "num_processes": 1},
        model={"checkpoint": "tiny", "sha256": "0" * 64},
        data={split: DataRecord(fingerprint=fingerprint, n=6, annotated=5, skipped=tuple(skipped)) for split in splits}
        | ({"train": DataRecord(fingerprint="t" * 64, n=9, annotated=7)} if steps else {}),
        training={"steps": steps} if steps else None,
        results={split: summarise(table) for split, table in tables.items()},
        outcomes={s: StoredFile.of(directory / "outcomes" / f"{s}.parquet", directory) for s in splits},
    )
    whole.model_copy(update=record or {}).write(directory)


def write_gallery(directory, rows, seed):
    generator = torch.Generator().manual_seed(int(seed))
    masks = torch.zeros(len(rows), 8, 12, dtype=torch.uint8)
    masks[:, 2:6, 3:7] = 1
    heatmaps = torch.rand(len(rows), 2, 3, generator=generator)
    heatmaps[-1] = 0
    images = torch.randint(256, (len(rows), 8, 12, 3), generator=generator, dtype=torch.uint8)
    Gallery(images, masks, heatmaps, torch.tensor(rows)).write(directory / "gallery" / "test.safetensors")


@pytest.fixture
def run(tmp_path):
    """Three arms of one run, with galleries, curves and a sample that could not be read."""
    directory = tmp_path / "toy"
    skipped = [SkippedSample(sample_id="bad|<i>.jpg", reason="cannot be read")]
    write_arm(directory, "evidence", **EVIDENCE, weight=1.0, gallery="abe", steps=80, skipped=skipped)
    write_arm(directory, "baseline", **BASELINE, gallery="ab", steps=1, order=[5, 3, 1, 0, 2, 4])
    write_arm(directory, "zero_shot", **ZERO_SHOT | {"swapped": BASELINE["swapped"]}, gallery="ba")
    return directory


def test_numbers_are_those_worked_out_by_hand(run):
    report.write_comparison(run)
    arms = json.loads((run / "comparison.json").read_text())["arms"]
    assert list(arms) == ["zero_shot", "baseline", "evidence"]
    evidence, baseline, zero_shot = (arms[arm]["test"] for arm in ("evidence", "baseline", "zero_shot"))
    assert {key: value for key, value in evidence.items() if key != "intervals"} == {
        "n": 6,
        "accuracy": pytest.approx(4 / 6),
        "PT": pytest.approx(3 / 4),
        "IR": 1.0,
        "RR": pytest.approx(3 / 5),
        "mean_RMA": pytest.approx((0.9 + 0.5 + 0.7 + 0.2 + 0.0) / 5),
        "empty_heatmaps": 1,
        "swapped_accuracy": 0.5,
        "n_annotated": 5,
        "swapped_n": 4,
        "uniform_PT": pytest.approx(1 / 4),  # of a, b, c and e only a has a mask of half the image
        "quadrants": {"RR": 3, "RW": 1, "WR": 0, "WW": 1},
    }
    assert [baseline[rate] for rate in ("accuracy", "PT", "IR", "RR")] == pytest.approx([4 / 6, 1 / 3, 1 / 2, 1 / 5])
    assert zero_shot["PT"] == 0.0
    assert zero_shot["IR"] is None  # nothing it points at is right, so there is nothing to divide by


def test_differences_are_taken_against_the_baseline(run):
    report.write_comparison(run)
    differences = json.loads((run / "comparison.json").read_text())["differences"]
    assert list(differences) == ["zero_shot - baseline", "evidence - baseline"]
    of_evidence = differences["evidence - baseline"]["test"]
    assert of_evidence["PT"]["estimate"] == pytest.approx(3 / 4 - 1 / 3)
    assert of_evidence["RR"]["estimate"] == pytest.approx(2 / 5)
    assert of_evidence["accuracy"]["estimate"] == pytest.approx(0.0)
    assert of_evidence["PT"]["low"] <= of_evidence["PT"]["estimate"] <= of_evidence["PT"]["high"]
    assert differences["zero_shot - baseline"]["test"]["IR"]["estimate"] is None


def test_arms_are_joined_by_sample_id(tmp_path):
    for name, order in (("straight", range(6)), ("shuffled", [4, 2, 0, 5, 3, 1])):
        write_arm(tmp_path / name, "baseline", **BASELINE)
        write_arm(tmp_path / name, "evidence", **EVIDENCE, order=order)
    straight, shuffled = (report.compare(tmp_path / name) for name in ("straight", "shuffled"))
    assert shuffled.to_json() == straight.to_json()
    assert shuffled.arms[1].outcomes["test"].sample_ids == ("a", "b", "c", "d", "e", "f")


def test_regenerating_gives_the_same_bytes(run):
    names = ("comparison.json", "comparison.md", "comparison.html")
    report.write_comparison(run)
    first = [(run / name).read_bytes() for name in names]
    for name in names:
        (run / name).unlink()
    report.write_comparison(run)
    assert [(run / name).read_bytes() for name in names] == first


class Page(HTMLParser):
    """Start tags with their attributes, and text; fails on ill-nested tags."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use"})

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(run):
    report.write_comparison(run)
    page = Page()
    page.feed((run / "comparison.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_nothing_a_data_set_says_becomes_markup(run):
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "i" not in {tag for tag, _ in page.tags}
    assert any(HOSTILE in text for text in page.text)
    assert "<i>" not in (run / "comparison.md").read_text()


def test_the_page_asks_nothing_of_any_server(run):
    tags = page_of(run).tags
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    loaded = [value for _, attributes in tags for key, value in attributes.items() if key in loading]
    assert loaded
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in loaded)
    assert not {"link", "script", "iframe", "object", "embed", "base"} & {tag for tag, _ in tags}
    text = (run / "comparison.html").read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_the_page_can_be_read_by_everyone(run):
    tags = page_of(run).tags
    assert ("html", {"lang": "en"}) in tags
    assert any(attributes.get("name") == "viewport" for _, attributes in tags)
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert images
    assert all(image["alt"] for image in images)
    assert all(a["aria-label"] for _, a in tags if a.get("role") in ("img", "region"))
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [value[1:] for _, a in tags for key, value in a.items() if key == "xlink:href"]
    assert set(references) <= set(ids)
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(below <= above + 2 for above, below in pairwise(levels))


def test_the_gallery_shows_the_images_all_arms_have_kept(run):
    page = page_of(run)
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(alts) == 2 * 4  # a and b; the image itself and three arms
    assert f"evidence: empty heatmap over the image; predicts {HOSTILE}, right; RMA 0.50" not in alts
    assert f"evidence: heatmap over the image; predicts {HOSTILE}, right; RMA 0.50" in alts
    assert f"zero_shot: empty heatmap over the image; predicts {HOSTILE}, wrong; RMA 0.10" in alts


def test_captions_of_the_gallery_do_not_rely_on_colour(run):
    text = "".join(page_of(run).text)
    assert "✓ RMA 0.90" in text
    assert "✗ RMA 0.10" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"layers": "all"}}, r"evaluation\.layers is \[-1\] and 'all'"),
        ({"evaluation": {"heatmap": "legrad"}}, r"evaluation\.heatmap is 'gradient_attention' and 'legrad'"),
        ({"evaluation": {"explain": "prediction"}}, r"evaluation\.explain"),
        ({"evaluation": {"threshold": 0.3}}, r"evaluation\.threshold is 0\.5 and 0\.3"),
        ({"evaluation": {"swap_seed": 1}}, r"evaluation\.swap_seed is None and 1"),
        ({"fingerprint": "0" * 64}, "fingerprints of the test data are 'f+' and '0+'"),
        ({"ids": ["a", "b", "c", "d", "e", "z"]}, "only 'baseline' has 'f', only 'evidence' has 'z'"),
        ({"labels": [1, 1, 0, 1, 0, 1]}, "labels differ for 'a'"),
        ({"shares": [0.6, 0.2, 0.3, 0.2, 0.2, NAN]}, "masks differ for 'c'"),
        ({"swapped": [0, None, 0, 0, None, None]}, "swapped images differ for 'b'"),
        ({"class_names": ("cat", "dog")}, "class names are"),
        ({"splits": ("test", "shifted")}, "test splits are 'test' and 'test', 'shifted'"),
    ],
)
def test_arms_that_were_not_judged_alike_are_refused(tmp_path, changes, message):
    write_arm(tmp_path, "baseline", **BASELINE)
    write_arm(tmp_path, "evidence", **EVIDENCE | changes)
    with pytest.raises(ValueError, match=f"'baseline' and 'evidence' cannot be compared.*{message}"):
        report.write_comparison(tmp_path)
    assert not (tmp_path / "comparison.json").exists()


def test_a_run_without_finished_arms_is_a_run(tmp_path):
    (tmp_path / "evidence").mkdir()
    comparison = report.write_comparison(tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == {"arms": {}, "differences": {}}
    assert "No finished arms" in (tmp_path / "comparison.md").read_text()
    assert "No finished arms" in (tmp_path / "comparison.html").read_text()
    assert "no finished arms" in report.format_table(comparison)


def test_one_arm_is_compared_with_nothing(tmp_path):
    write_arm(tmp_path, "evidence", **EVIDENCE)
    comparison = report.write_comparison(tmp_path)
    assert comparison.reference == "evidence"
    assert comparison.differences == {}
    assert comparison.verdicts["test"] == ("On test: there is one arm, evidence, and nothing to compare it with.",)
    assert "difference" not in report.format_table(comparison)
    assert "Difference" not in (tmp_path / "comparison.html").read_text()


def test_without_a_baseline_the_first_arm_is_the_reference(tmp_path):
    write_arm(tmp_path, "zero_shot", **ZERO_SHOT)
    write_arm(tmp_path, "other", **BASELINE | {"swapped": ZERO_SHOT["swapped"]})
    assert list(report.compare(tmp_path).differences) == ["other - zero_shot"]
    assert list(report.compare(tmp_path, ["other", "zero_shot"]).differences) == ["zero_shot - other"]


def test_arms_can_be_chosen(run):
    assert list(report.compare(run, ["evidence", "baseline"]).numbers) == ["evidence", "baseline"]


def test_an_arm_that_is_asked_for_must_be_there(run):
    with pytest.raises(RunFileError, match=r"run\.json does not exist"):
        report.compare(run, ["baseline", "evidense"])
    with pytest.raises(ValueError, match="'baseline' are named more than once"):
        report.compare(run, ["baseline", "baseline"])


def test_a_directory_under_another_name_is_refused(tmp_path):
    write_arm(tmp_path, "baseline", **BASELINE)
    (tmp_path / "baseline").rename(tmp_path / "renamed")
    with pytest.raises(ValueError, match="is of arm 'baseline', expected 'renamed'"):
        report.compare(tmp_path)


def test_a_gallery_of_rows_that_are_not_there_is_refused(tmp_path):
    write_arm(tmp_path, "baseline", **BASELINE)
    write_gallery(tmp_path / "baseline", [0, 6], 0)
    with pytest.raises(ValueError, match="shows row 6, but the outcomes have 6 rows"):
        report.compare(tmp_path)


def test_a_split_without_images_has_no_intervals(tmp_path):
    nothing = Outcomes.from_columns(**{c: [] for c in OUTCOMES_SCHEMA.names}, class_names=["cat", "dog"], split="test")
    for arm in ("baseline", "evidence"):
        write_arm(tmp_path, arm, **BASELINE)
        nothing.write(tmp_path / arm / "outcomes" / "test.parquet")
        record = RunRecord.read(tmp_path / arm)
        stored = StoredFile.of(tmp_path / arm / "outcomes" / "test.parquet", tmp_path / arm)
        record.model_copy(update={"outcomes": {"test": stored}}).write(tmp_path / arm)
    comparison = report.write_comparison(tmp_path)
    assert "too few right predictions" in comparison.verdicts["test"][0]
    assert json.loads(comparison.to_json())["arms"]["baseline"]["test"]["intervals"]["PT"] == [None, None]


UP, DOWN, FLAT = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.02, -0.1, 0.1)
UNKNOWN = Interval(NAN, NAN, NAN)


@pytest.mark.parametrize(
    ("PT", "RR", "swapped", "claim"),
    [
        (UP, UP, FLAT, "the maps moved onto the evidence; behaviour on swapped backgrounds is not shown to follow."),
        (UP, UP, UP, "the maps moved onto the evidence; accuracy on swapped backgrounds rose with them."),
        (UP, UP, UNKNOWN, "the maps moved onto the evidence; behaviour on swapped backgrounds was not measured."),
        (UP, FLAT, FLAT, "PT rose, but more images right for the right reason are not shown; behaviour"),
        (DOWN, DOWN, DOWN, "moved off the evidence; accuracy on swapped backgrounds fell."),
        (FLAT, FLAT, UP, "no change of the maps is shown; accuracy on swapped backgrounds rose."),
        (FLAT, UP, FLAT, "no change of the maps is shown; behaviour on swapped backgrounds is not shown to change."),
        (UNKNOWN, FLAT, FLAT, "too few right predictions with evidence to speak of the maps; behaviour"),
    ],
)
def test_a_verdict_claims_what_the_intervals_show(PT, RR, swapped, claim):
    rates = {"PT": PT, "IR": FLAT, "RR": RR, "accuracy": FLAT, "swapped_accuracy": swapped}
    assert claim in report.verdict(rates)


@pytest.mark.parametrize(("rate", "interval", "claim"), [("accuracy", DOWN, "accuracy fell"), ("IR", UP, "IR rose")])
def test_a_verdict_names_what_it_costs(rate, interval, claim):
    rates = dict.fromkeys(("PT", "IR", "RR", "accuracy", "swapped_accuracy"), FLAT) | {rate: interval}
    assert report.verdict(rates).endswith(f"; {claim}.")
    assert "rose" not in report.verdict(rates | {rate: FLAT})
    assert "fell" not in report.verdict(rates | {rate: FLAT})


def test_a_verdict_gives_points_with_their_interval():
    rates = dict.fromkeys(("PT", "IR", "RR", "accuracy"), FLAT) | {"swapped_accuracy": Interval(0.03, -0.02, 0.08)}
    assert "accuracy on swapped backgrounds +3.0 points [\N{MINUS SIGN}2.0, +8.0]" in report.verdict(rates)
    undefined = dict.fromkeys(("PT", "IR", "RR", "accuracy", "swapped_accuracy"), UNKNOWN)
    assert report.verdict(undefined).startswith("no rate is defined in both arms: ")
    half = rates | {"PT": Interval(0.5, NAN, NAN)}
    assert "PT +50.0 points [no interval]" in report.verdict(half)


def test_a_map_judged_by_what_it_was_trained_through_is_pointed_out(run, tmp_path):
    notes = report._notes(report.compare(run))
    assert sum("the very map it is judged by" in note for note in notes) == 1
    assert any(note.startswith("evidence was trained through") for note in notes)
    assert any("evidence has 1 empty heatmaps of 6" in note for note in notes)
    assert any(note.startswith("1 sample was left out") for note in notes)


def test_without_anything_to_note_there_are_no_notes(tmp_path):
    write_arm(tmp_path, "baseline", **BASELINE)
    report.write_comparison(tmp_path)
    assert "## Notes" not in (tmp_path / "comparison.md").read_text()
    assert "Before you believe it" not in (tmp_path / "comparison.html").read_text()


def test_the_report_says_what_differs_in_the_settings(run):
    report.write_comparison(run)
    text = (run / "comparison.md").read_text()
    assert "| evidence.weight | \N{EN DASH} | 0 | 1 |" in text  # zero-shot has no loss to weigh
    assert "| evaluation.threshold" not in text
    assert "| method." not in text
    assert "| training." not in text


def test_the_report_says_what_each_arm_was(run):
    write_arm(run, "swap", **BASELINE, steps=1, config={"training": {"learning_rate": 0.1, "background_swap": 0.5}})
    nothing = " | ".join(["\N{EN DASH}"] * 4)
    report.write_comparison(run)
    text = (run / "comparison.md").read_text()
    assert f"| zero_shot | zero_shot | {nothing} |" in text
    assert "| baseline | flcp | 0 | 0 | 0 | 1 |" in text
    assert "| evidence | flcp | 1 | 0 | 0 | 80 |" in text
    assert "| swap | flcp | 0 | 0.5 | 0 | 1 |" in text
    lines = [line.split() for line in report.format_table(report.compare(run)).splitlines()]
    assert ["evidence", "flcp", "1", "0", "0", "80"] in lines
    assert "What each arm was" in (run / "comparison.html").read_text()


def test_all_five_arms_come_in_their_order(tmp_path):
    arms = ["evidence_swap", "zero_shot", "swap", "baseline", "evidence"]
    for arm in arms:
        write_arm(tmp_path, arm, **BASELINE, steps=1)
    comparison = report.write_comparison(tmp_path)
    ordered = ["zero_shot", "baseline", "evidence", "swap", "evidence_swap"]
    assert list(comparison.numbers) == ordered
    assert list(comparison.differences) == [f"{arm} - baseline" for arm in ordered if arm != "baseline"]
    assert len(comparison.verdicts["test"]) == 3


def warnings(run):
    report.write_comparison(run)
    found = report._warnings(report.compare(run))
    for text in found:
        assert text in (run / "comparison.md").read_text()
        assert text in (run / "comparison.html").read_text()
        assert f"WARNING: {text}" in report.format_table(report.compare(run))
    return found


def test_arms_that_differ_in_what_makes_them_give_no_warning(run):
    training = {"learning_rate": 0.1, "background_swap": 0.5}
    write_arm(run, "evidence_swap", **EVIDENCE, weight=1.0, steps=1, config={"training": training})
    assert warnings(run) == []
    assert "WARNING" not in report.format_table(report.compare(run))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"record": {"seed": 1}}, "seed is 0 and 1"),
        ({"record": {"model": {"sha256": "1" * 64}}}, f"start weights is {'0' * 64} and {'1' * 64}"),
        ({"record": {"environment": {"num_processes": 2}}}, "processes is 1 and 2"),
        ({"config": {"model": {"checkpoint": "other"}}}, "model.checkpoint is tiny and other"),
        ({"config": {"training": {"learning_rate": 0.2}}}, "training.learning_rate is 0.1 and 0.2"),
        ({"config": {"method": {"name": "lp", "templates": ["a {}"]}}}, "method.name is flcp and lp"),
        ({"config": {"evidence": {"layers": "all"}}}, r"evidence.layers is [-1] and all"),
    ],
)
def test_arms_that_differ_in_more_than_they_mean_to_give_a_warning(run, changes, named):
    write_arm(run, "evidence", **EVIDENCE, weight=1.0, steps=80, **changes)
    (warning,) = warnings(run)
    assert warning.startswith("arms baseline and evidence differ in more than they mean to: ")
    assert named in warning


def test_zero_shot_is_only_compared_in_what_it_has(run):
    write_arm(
        run,
        "zero_shot",
        **ZERO_SHOT | {"swapped": BASELINE["swapped"]},
        config={"training": {"learning_rate": 9.0}},
        record={"seed": 5},
    )
    assert warnings(run) == []
    method = {"name": "zero_shot", "templates": ["the {}"]}
    write_arm(run, "zero_shot", **ZERO_SHOT | {"swapped": BASELINE["swapped"]}, config={"method": method})
    assert "method.templates is [a {}] and [the {}]" in warnings(run)[0]


def test_training_images_that_differ_give_a_warning(run):
    record = RunRecord.read(run / "evidence")
    other = record.data["train"].model_copy(update={"fingerprint": "u" * 64})
    record.model_copy(update={"data": record.data | {"train": other}}).write(run / "evidence")
    assert "images of train is tttttttttttt and uuuuuuuuuuuu" in warnings(run)[0]


def test_that_each_arm_lists_itself_is_no_difference_in_the_settings(run):
    report.write_comparison(run)
    assert "run.arms" not in (run / "comparison.md").read_text()


def test_the_data_table_counts_masks(run):
    rows = report._data_table(report.compare(run).arms)
    assert rows[1][:6] == ["zero_shot", "test", "6", "5", "4 / 1 / 1", "0"]
    assert ["baseline", "train", "9", "7", "\N{EN DASH}", "\N{EN DASH}", "0", "tttttttttttt"] in rows


def test_the_terminal_table_is_aligned(run):
    table = report.format_table(report.compare(run))
    _, header, *rows = table.split("\n\n")[1].splitlines()
    assert len({len(line) for line in (header, *rows)}) == 1
    assert rows[2].split() == ["evidence", "66.7", "75.0", "100.0", "60.0", "46.0", "25.0", "50.0", "1", "6", "5"]
    assert "<" not in table


def test_every_figure_is_drawn_with_text_as_text(run):
    report.write_comparison(run)
    text = (run / "comparison.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 4  # quadrants, thresholds, two losses; the ratio was never measured
    assert ">Evidence loss</text>" in text
    assert "Task loss by step, running mean" in text
