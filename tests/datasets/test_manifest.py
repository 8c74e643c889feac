import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import ValidationError

from evidence_ft.datasets import manifest
from evidence_ft.images import DataError
from evidence_ft.samples import validate

REAL = Path(__file__).resolve().parents[2] / "../shared/real/white_blood_cells"
WIDTH, HEIGHT = 6, 4

TABLE = """\
sample_id,image,label,mask,box_x,box_y,box_width,box_height,split
007,images/a.png,monocyte,masks/a.png,,,,,train
8,images/b.png,eosinophil,,1,0,2,3,train
c,images/c.png,monocyte,,,,,,train
d,images/a.png,neutrophil,masks/a.png,0,0,1,1,test
"""


def written(folder, text=TABLE, name="labels.csv"):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(exist_ok=True)
    for image in "abc":
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{image}.png")
    Image.fromarray(left_column() * 200).save(folder / "masks" / "a.png")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def left_column():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, 0] = 1
    return mask


def loaded(folder, text=TABLE, split="train", **settings):
    return manifest.load(manifest.Config(file=written(folder, text), **settings), split)


# What is read


def test_classes_are_the_labels_of_the_whole_file_in_alphabetical_order(tmp_path):
    train, test = loaded(tmp_path), loaded(tmp_path, split="test")
    assert train.class_names == test.class_names == ("eosinophil", "monocyte", "neutrophil")
    assert (train.labels, test.labels) == ([1, 0, 1], [2])


def test_ids_are_text(tmp_path):
    assert loaded(tmp_path).sample_ids == ["007", "8", "c"]


def test_a_mask_a_box_and_neither_are_told_apart(tmp_path):
    dataset = loaded(tmp_path)
    assert dataset.mask_sources == ["mask", "box", "none"]
    np.testing.assert_array_equal(dataset[0].mask, left_column())
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[0:3, 1:3] = 1  # x 1, y 0, width 2, height 3
    np.testing.assert_array_equal(dataset[1].mask, expected)
    assert dataset[2].mask is None


def test_a_mask_wins_over_a_box(tmp_path):
    sample = loaded(tmp_path, split="test")[0]
    assert sample.mask_source == "mask"
    np.testing.assert_array_equal(sample.mask, left_column())


def test_the_threshold_is_that_of_the_config(tmp_path):
    dataset = loaded(tmp_path, mask_threshold=0.9)  # the mask is 200 of 255
    with pytest.raises(DataError, match=r"a\.png: its largest value is 0\.7843 of 1.*lower mask_threshold to 0\.78"):
        dataset[0]


def test_a_good_manifest_passes_the_check(tmp_path):
    dataset = loaded(tmp_path)
    assert validate(dataset, on_bad_sample="error", progress=False) == (dataset, [])


def test_only_three_columns_are_needed(tmp_path):
    dataset = loaded(tmp_path, "sample_id,image,label\n1,images/a.png,x\n")
    assert (dataset.sample_ids, dataset.mask_sources) == (["1"], ["none"])


def test_columns_may_come_in_any_order(tmp_path):
    assert loaded(tmp_path, "label,sample_id,image\nx,1,images/a.png\n").sample_ids == ["1"]


def test_labels_that_look_like_missing_values_or_numbers_are_text(tmp_path):
    text = "sample_id,image,label\n1,images/a.png,NA\n2,images/b.png,null\n3,images/c.png,01\n"
    assert loaded(tmp_path, text).class_names == ("01", "NA", "null")


def test_space_around_cells_a_byte_order_mark_and_empty_lines_do_not_count(tmp_path):
    text = "\ufeffsample_id, image ,label\r\n\r\n1,images/a.png, x \r\n2,images/b.png,x\r\n"
    dataset = loaded(tmp_path, text)
    assert (dataset.sample_ids, dataset.class_names) == (["1", "2"], ("x",))


def test_names_may_contain_commas_and_line_breaks_in_quotes(tmp_path):
    dataset = loaded(tmp_path, 'sample_id,image,label\n1,images/a.png,"cat, tabby"\n"2\n3",images/b.png,"a ""b"""\n')
    assert dataset.class_names == ('a "b"', "cat, tabby")
    assert dataset.sample_ids == ["1", "2\n3"]


def test_paths_are_relative_to_root_if_it_is_given(tmp_path):
    written(tmp_path)
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    path = elsewhere / "labels.csv"
    path.write_text(TABLE)
    assert manifest.load(manifest.Config(file=path, root=tmp_path), "train")[0].image.size == (WIDTH, HEIGHT)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path)
    assert len(manifest.load(manifest.Config(file=Path("~/labels.csv")), "train")) == 3


def test_loading_opens_no_image(tmp_path):
    path = written(tmp_path)
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"")
    assert len(manifest.load(manifest.Config(file=path), "train")) == 3


# Parquet


def as_parquet(folder, columns):
    written(folder)
    path = folder / "labels.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
    return manifest.Config(file=path)


def test_parquet_gives_what_csv_gives(tmp_path):
    config = as_parquet(
        tmp_path,
        {
            "sample_id": ["007", "8", "c"],
            "image": ["images/a.png", "images/b.png", "images/c.png"],
            "label": ["monocyte", "eosinophil", "monocyte"],
            "mask": ["masks/a.png", None, None],
            "box_x": [None, 1.0, float("nan")],
            "box_y": [None, 0.0, float("nan")],
            "box_width": [None, 2.0, float("nan")],
            "box_height": [None, 3.0, float("nan")],
        },
    )
    ours, theirs = manifest.load(config, "train"), loaded(tmp_path)
    assert ours.sample_ids == theirs.sample_ids
    assert ours.mask_sources == theirs.mask_sources
    np.testing.assert_array_equal(ours[1].mask, theirs[1].mask)


def test_numbers_in_a_parquet_file_become_text(tmp_path):
    config = as_parquet(tmp_path, {"sample_id": [7], "image": ["images/a.png"], "label": [3]})
    dataset = manifest.load(config, "train")
    assert (dataset.sample_ids, dataset.class_names) == (["7"], ("3",))


def test_rows_of_a_parquet_file_are_counted_from_one(tmp_path):
    config = as_parquet(tmp_path, {"sample_id": ["1", "2"], "image": ["images/a.png"] * 2, "label": ["x", None]})
    with pytest.raises(DataError, match=r"labels\.parquet, row 2: found an empty label"):
        manifest.load(config, "train")


def test_folders_named_like_a_partition_add_no_columns(tmp_path):
    folder = tmp_path / "day=1"
    folder.mkdir()
    config = as_parquet(folder, {"sample_id": ["1"], "image": ["images/a.png"], "label": ["x"]})
    assert len(manifest.load(config, "train")) == 1


def test_a_file_that_is_no_parquet_table_is_named(tmp_path):
    path = written(tmp_path, "sample_id", "labels.parquet")
    with pytest.raises(
        DataError, match=r"labels\.parquet: found something that is not a Parquet table .*write the file"
    ):
        manifest.load(manifest.Config(file=path), "train")


# Which rows, which classes


def test_classes_state_an_order_and_may_lack_samples(tmp_path):
    classes = ("neutrophil", "monocyte", "eosinophil", "basophil")
    dataset = loaded(tmp_path, classes=classes)
    assert (dataset.class_names, dataset.labels) == (classes, [1, 2, 1])


def test_a_label_outside_the_classes_is_named_with_its_line(tmp_path):
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, classes=("monocyte", "neutrophil", "Eosinophil"))
    message = str(caught.value)
    assert "labels.csv, line 3: found label 'eosinophil'; expected one of data.classes" in message
    assert "did you mean 'Eosinophil'?" in message
    assert "add it to data.classes, or to data.leave_out" in message


def test_a_class_left_out_takes_its_rows_along(tmp_path):
    dataset = loaded(tmp_path, leave_out=("eosinophil",))
    assert (dataset.class_names, dataset.sample_ids) == (("monocyte", "neutrophil"), ["007", "c"])


def test_a_class_to_leave_out_must_occur(tmp_path):
    with pytest.raises(DataError, match=r"labels\.csv: found no class 'eosinofil'.*did you mean 'eosinophil'\?"):
        loaded(tmp_path, leave_out=("eosinofil",))


def test_a_split_without_rows_of_the_classes_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no row of split 'test' is left; .* check data\.leave_out"):
        loaded(tmp_path, split="test", leave_out=("neutrophil",))


def test_at_most_so_many_rows_of_a_class_are_kept(tmp_path):
    # sha256: "c" 2e7d..., "007" 629f...
    assert loaded(tmp_path, max_per_class=1).sample_ids == ["8", "c"]


def test_a_split_that_is_not_in_the_file_is_named_with_those_that_are(tmp_path):
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, split="tset")
    message = str(caught.value)
    assert "found no row of split 'tset' (did you mean 'test'?)" in message
    assert "the file has 'train' (3 rows), 'test' (1 rows)" in message
    assert "data.train_split and data.test_splits" in message


def test_without_a_split_column_all_rows_are_for_training(tmp_path):
    text = "sample_id,image,label\n1,images/a.png,x\n"
    assert len(loaded(tmp_path, text, "fit", train_split="fit")) == 1
    with pytest.raises(DataError, match=r"found no column 'split', so all rows are for training.*hold some rows back"):
        loaded(tmp_path, text, "test")


# What can be wrong


def with_row(row):
    return "sample_id,image,label,mask,box_x,box_y,box_width,box_height\n1,images/a.png,x,,,,,\n" + row + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"labels\.csv: found an empty file; expected a header: sample_id,image,label"),
        ("sample_id,image,label\n", r"labels\.csv: found a header but no rows; .*; add them"),
        ("sample_id;image;label\n", r"labels\.csv: found a header without commas: 'sample_id;image;label'; .* save"),
        ("sample_id,img,label\n", r"labels\.csv: found no column 'image'; .*; add it, or rename.*'img'"),
        ("sample_id,image,label,image\n", r"labels\.csv: found column 'image' more than once; .*; remove one"),
        ("sample_id,image,label,masks\n", r"found column 'masks', .*did you mean 'mask'\?.*data\.ignore_columns"),
        ("sample_id,image,label,box_x\n", r"found column 'box_x' but not 'box_y', 'box_width', 'box_height'; .*add"),
        (with_row("2,images/b.png,x"), r"labels\.csv, line 3: found 3 cells; expected 8 .*; quote cells"),
        (with_row(",images/b.png,x,,,,,"), r"labels\.csv, line 3: found an empty sample_id; .*fill it in"),
        (with_row("2,,x,,,,,"), r"labels\.csv, line 3: found an empty image; .*fill it in"),
        (with_row("2,images/b.png,  ,,,,,"), r"labels\.csv, line 3: found an empty label; .*fill it in"),
        (with_row("1,images/b.png,x,,,,,"), r"line 3: found sample_id '1', as in line 2; .*rename or remove one"),
        (with_row("2,images/b.png,x,,1,2,,"), r"line 3: found 'box_x', 'box_y' but no 'box_width', 'box_height'; "),
        (with_row("2,images/b.png,x,,1,2,a,4"), r"line 3: box_width: found 'a'; expected a number of pixels; corr"),
        (with_row('2,"images/b.png,x'), r"labels\.csv, line 3: found something that is not CSV .*closed quotes"),
        (with_row("\n\n2,,x,,,,,"), r"labels\.csv, line 5: found an empty image"),
        (with_row('"2\n2",images/b.png,x,,,,,\n3,,x,,,,,'), r"labels\.csv, line 5: found an empty image"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, text)


def test_an_empty_split_is_named_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"labels\.csv, line 4: found an empty split; .*fill it in"):
        loaded(tmp_path, TABLE.replace("c,images/c.png,monocyte,,,,,,train", "c,images/c.png,monocyte,,,,,,"))


def test_an_id_must_be_unique_in_all_splits_together(tmp_path):
    with pytest.raises(DataError, match=r"line 5: found sample_id '007', as in line 2; .* in all splits together"):
        loaded(tmp_path, TABLE.replace("\nd,", "\n007,"))


def test_an_unknown_column_can_be_ignored_on_purpose(tmp_path):
    text = "sample_id,image,label,camera\n1,images/a.png,x,left\n"
    assert len(loaded(tmp_path, text, ignore_columns=("camera",))) == 1


def test_text_that_is_not_utf_8_is_named(tmp_path):
    path = written(tmp_path)
    path.write_bytes("sample_id,image,label\n1,images/a.png,Bär\n".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"labels\.csv, line \d: .*not CSV in UTF-8 .*save the table again as CSV UTF-8"
    ):
        manifest.load(manifest.Config(file=path), "train")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match=r"found no file .*labels\.csv; expected the manifest; correct data\.file"):
        manifest.load(manifest.Config(file=tmp_path / "labels.csv"), "train")


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"labels\.xlsx: found a file ending in '\.xlsx'; expected \.csv or \.parquet"):
        manifest.load(manifest.Config(file=tmp_path / "labels.xlsx"), "train")


def test_all_missing_files_are_listed_on_loading(tmp_path):
    path = written(tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    (tmp_path / "images" / "c.png").unlink()
    with pytest.raises(DataError) as caught:
        manifest.load(manifest.Config(file=path), "train")
    message = str(caught.value)
    assert "labels.csv: found no file at 2 paths:" in message
    assert re.search(r"line 2: mask .*a\.png\n  line 4: image .*c\.png\n", message)
    assert f"relative to {tmp_path} (data.root)" in message
    assert "--data.on-bad-sample skip" in message


def test_only_ten_missing_files_are_listed(tmp_path):
    rows = "".join(f"{row},images/lost{row}.png,x\n" for row in range(12))
    with pytest.raises(DataError, match=r"12 paths(.|\n)*\.\.\. and 2 more") as caught:
        loaded(tmp_path, "sample_id,image,label\n" + rows)
    assert str(caught.value).count("lost") == 10


def test_when_skipping_a_missing_file_is_an_error_of_its_sample_alone(tmp_path):
    path = written(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    config = manifest.Config(file=path, on_bad_sample="skip")
    kept, bad = validate(manifest.load(config, "train"), on_bad_sample="skip", progress=False)
    assert kept.sample_ids == ("007", "c")
    assert [sample_id for sample_id, _ in bad] == ["8"]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("3,0,5,2", r"line 3: box: found x 3 to 8, y 0 to 2 in an image of 6x4 pixels"),
        ("1,1,0,2", r"line 3: box: found a box of 0x2 pixels"),
        ("nan,1,1,2", r"line 3: box: found a box of"),
    ],
)
def test_a_box_that_does_not_fit_is_named_when_its_sample_is_opened(tmp_path, box, message):
    dataset = loaded(tmp_path, with_row(f"2,images/b.png,x,,{box}"))
    with pytest.raises(DataError, match=rf"labels\.csv, {message}"):
        dataset[1]


def test_a_mask_of_another_size_is_found_by_the_check(tmp_path):
    dataset = loaded(tmp_path)
    Image.new("L", (3, 3), 255).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"sample '007': found a mask of 3x3 pixels .* expected 6x4"):
        validate(dataset, on_bad_sample="error", progress=False)


def test_a_threshold_that_marks_everything_is_refused():
    with pytest.raises(ValidationError, match="mask_threshold"):
        manifest.Config(file=Path("labels.csv"), mask_threshold=0.0)


# Real data


@pytest.mark.skipif(not REAL.is_dir(), reason="the white blood cells are not here")
def test_white_blood_cells_can_be_used():
    config = manifest.Config(file=REAL / "labels.csv", leave_out=("basophil",), mask_threshold=0.25)
    train, test = manifest.load(config, "train"), manifest.load(config, "test")
    assert train.class_names == test.class_names == ("eosinophil", "lymphocyte", "monocyte", "neutrophil")
    assert len(train) + len(test) == 209 + 90 + 63 + 34
    assert validate(test, on_bad_sample="error", progress=False) == (test, [])
    shares = [
        sample.mask.mean() for dataset in (train, test) for sample in map(dataset.__getitem__, range(len(dataset)))
    ]
    assert np.mean(shares) == pytest.approx(0.29, abs=0.01)
