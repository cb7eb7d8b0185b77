"""Tables of splits as people write them, and what a dataset.json says."""

import json

import pytest

from pgl_ray.config import LabelsConfig
from pgl_ray.files.layout import read_layout

WANTED = {"case_1": "train", "case_2": "train", "case_3": "test"}
NAMES = {"liver": 1, "left kidney": 2, "kidney": 3, "left": 4, "L5, lower": 5}


def touch(root, *paths):
    for path in paths:
        file = root / f"{path}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def layout_of(root, table, names=None):
    if isinstance(table, str):
        table = table.encode()
    (root / "t.csv").write_bytes(table)
    return read_layout(str(root), LabelsConfig(table="t.csv", names=names or {}))


@pytest.fixture
def labelled(tmp_path):
    touch(tmp_path, *(f"{kind}/{case}" for kind in ("images", "labels") for case in WANTED))
    return tmp_path


TABLES = {
    "plain": "scan_id,split\n{}",
    "suffix": "scan_id,split\n{.nii.gz}",
    "folders": "id,split\n{images/}",
    "folders and suffix": "image,split\n{images/.nii.gz}",
    "windows": "image,split\n{images\\.nii.gz}",
    "other order": "split,scan_id\n{-}",
    "capitals": "Case,Split\n{}",
    "quoted": '"patient","split"\n{"}',
    "a column before": "number,case,split\n{#}",
    "unknown name": "who,split\n{}",
}
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "comma and blank": ", ", "blanks around": " , "}


def rows_of(form):
    """Header and rows of a table in one of the forms above."""
    head, _, how = form.partition("\n")
    lines = []
    for number, (case, split) in enumerate(WANTED.items()):
        path = how.strip("{}")
        name = {"-": case, "#": case, '"': f'"{case}"'}.get(path) or path.replace(".nii.gz", "") + case
        name += ".nii.gz" if path.endswith(".nii.gz") else ""
        lines.append([split, name] if path == "-" else [str(number), name, split] if path == "#" else [name, split])
    return [head.split(","), *lines]


@pytest.mark.parametrize("delimiter", DELIMITERS.values(), ids=DELIMITERS)
@pytest.mark.parametrize("form", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\r\n"), ("", "\n\n")])
def test_tables_of_many_forms_mean_the_same(labelled, form, delimiter, start, end):
    text = start + end.join(delimiter.join(row) for row in rows_of(form)) + end
    layout = layout_of(labelled, text)
    assert {scan.scan_id: scan.split for scan in layout.scans} == WANTED
    assert not layout.faults and not layout.left_out


def test_a_column_with_another_name_is_said(labelled):
    rows = "".join(f"{split},{case}\n" for case, split in WANTED.items())
    layout = layout_of(labelled, f"split,who\n{rows}")
    assert {scan.scan_id: scan.split for scan in layout.scans} == WANTED
    assert [fault.reason for fault in layout.left_out] == ["its column 'who' is taken for the scans' ids"]


GOOD = "case_1,train\ncase_2,train\n"


@pytest.mark.parametrize(
    "table, message",
    [
        (
            f"scan_id,split\n{GOOD}case-3,test\n",
            r"no split to 1 labelled scan \(case_3\); rows that fit no scan: case-3",
        ),
        (f"scan_id,split\n{GOOD}", r"gives no split to 1 labelled scan \(case_3\): mend the table"),
        (f"scan_id,split\n{GOOD}case_3,\n", r"gives no split to 1 labelled scan \(case_3\)"),
        (
            "scan_id,split\na,train\nb,test\n",
            "no row fits a scan: its ids are a, b, the scans' are case_1, case_2, case_3",
        ),
        (f"scan_id,split\n{GOOD}case_3,test\ncase_3.nii.gz,train\n", "two rows for 'case_3', which differ"),
        ("", "is empty"),
        ("scan_id,split\ncase_1,train\n".encode("utf-16"), "cannot be read .*: save it as CSV in UTF-8"),
        ("scan_id,labelled_organs\ncase_1,spleen\n", "case_1: organ 'spleen' is none of"),
    ],
)
def test_tables_that_lose_something_are_refused(labelled, table, message):
    with pytest.raises(ValueError, match=message):
        layout_of(labelled, table, NAMES)


@pytest.mark.parametrize("table", ["gone.csv", "tables/gone.csv", "/nowhere/gone.csv"])
@pytest.mark.parametrize("near", [True, False])
def test_a_table_that_is_not_there_is_said_so(labelled, tmp_path, monkeypatch, table, near):
    """Where a file of that name lies in the folder of the command, that is meant."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mend = "or give an absolute one"
    if near:
        (tmp_path / "here/gone.csv").write_text("scan_id,split\n")
        mend = f"give labels.table={tmp_path}/here/gone.csv, which is there"
    with pytest.raises(ValueError) as error:
        read_layout(str(labelled), LabelsConfig(table=table, names=NAMES))
    path = labelled / table
    said = f"labels.table={path} is not there: a path is looked for from the source's folder on; {mend}"
    assert str(error.value) == said


def test_a_folder_in_place_of_a_table_is_said_so(labelled):
    (labelled / "tables").mkdir()
    with pytest.raises(ValueError, match=r"tables: cannot be read: Is a directory$"):
        read_layout(str(labelled), LabelsConfig(table="tables", names=NAMES))


def as_table(*rows):
    return "".join(f"{row}\n" for row in rows)


@pytest.mark.parametrize("mark", ["sep=;", '"sep=;"', "\ufeffsep=;"])
def test_a_spreadsheets_line_on_its_delimiter_is_skipped(labelled, mark):
    rows = [f"{case};{split};liver, kidney" for case, split in WANTED.items()]
    layout = layout_of(labelled, as_table(mark, "scan_id;split;labelled_organs", *rows), NAMES)
    assert {scan.scan_id: (scan.split, scan.labelled) for scan in layout.scans} == {
        case: (split, (1, 3)) for case, split in WANTED.items()
    }


@pytest.mark.parametrize("name", ["labeled_organs", "labelled organs", "LabelledOrgans", "Labeled-Organs"])
def test_other_spellings_of_labelled_organs_are_taken(labelled, name):
    layout = layout_of(labelled, as_table(f"scan_id,{name},,", *(f"{case},liver,," for case in WANTED)), NAMES)
    assert [scan.labelled for scan in layout.scans] == [(1,)] * 3


@pytest.mark.parametrize(
    "header, cells, message",
    [
        ("scan_id,split,split", "train,test", "two columns are called 'split': keep one"),
        ("scan_id,labelled_organs,labeled_organs", "liver,liver", "two columns are called 'labelled_organs'"),
        ("scan_id,split,labelled_organs", "train,liver,kidney", r"'case_1,train,liver,kidney' has more .* 3 columns"),
        ("scan_id,split", "train,,liver", "'case_1,train,,liver' has more cells than the 2 columns"),
        ("case_0,train", "train", "column 'train': is split meant"),
        ("case_0,other", "first", "split or labelled_organs, its first row is 'case_0, other'"),
        ("scan_id,liver,kidney", "1,0", "none of its columns is split or labelled_organs"),
        *((f"scan_id,{name}", "a", f"column '{name}': is split meant") for name in ("subset", "set", "fold")),
        ("scan_id,purpose", "train", "column 'purpose': is split meant"),
        ("scan_id,partition,labelled_organs", "a,liver", "column 'partition': is split meant"),
        ("scan_id,split,organs", "train,liver", "column 'organs': is labelled_organs meant"),
        *(("scan_id,split", word, f"split '{word}': is 'train' meant") for word in ("training", "Tr", "Train set")),
        *(("scan_id,split", word, f"split '{word}': is 'test' meant") for word in ("testing", "ts", "test_set")),
        ("scan_id,split", "valid", "split 'valid': is 'validation' meant"),
    ],
)
def test_what_a_table_may_mean_otherwise_is_refused(labelled, header, cells, message):
    with pytest.raises(ValueError, match=message) as caught:
        layout_of(labelled, as_table(header, *(f"{case},{cells}" for case in WANTED)), NAMES)
    assert str(caught.value).startswith("labels.table=") and "\n" not in str(caught.value)


def test_other_columns_beside_a_split_are_no_matter(labelled):
    rows = (f"{case},{number},site {number},{split}" for number, (case, split) in enumerate(WANTED.items()))
    layout = layout_of(labelled, as_table("scan_id,fold,site,split", *rows))
    assert {scan.scan_id: scan.split for scan in layout.scans} == WANTED


def test_rows_and_scans_that_fit_nothing_are_said(tmp_path):
    touch(tmp_path, "images/a", "images/b", "labels/a")
    layout = layout_of(tmp_path, "scan_id,split\na,train\nx,train\ny,test\n")
    assert {scan.scan_id: scan.split for scan in layout.scans} == {"a": "train", "b": "train"}
    assert sorted(fault.reason for fault in layout.left_out) == [
        "has 2 rows (x, y) of no scan that is here",
        "has no row for 1 scan (b), which are used without",
    ]


def test_a_test_scan_is_not_trained_on(tmp_path):
    touch(tmp_path, "imagesTr/a_0000", "imagesTs/b_0000", "labelsTr/a", "labelsTs/b")
    assert [s.split for s in layout_of(tmp_path, "id,split\na,val\nb,test\n").scans] == ["val", "test"]
    with pytest.raises(ValueError, match="puts 'imagesTs__b', of a folder of test scans, into 'train': mend it"):
        layout_of(tmp_path, "id,split\na,train\nb,train\n")


@pytest.mark.parametrize("form", ["{}", "{}.nii.gz", "/data/set/{}.nii.gz", "D:\\set\\{}.nii.gz", "set/{}"])
@pytest.mark.parametrize("channel", ["", "_0000"])
def test_a_path_means_the_file_at_that_path(tmp_path, form, channel):
    """Though file names come twice: each row's scan is the one in its folder."""
    paths = {f"{folder}/c{k}{channel}": split for folder, split in (("a", "train"), ("b", "val")) for k in (1, 2)}
    paths |= {f"b/d/c1{channel}": "test"}
    touch(tmp_path, *paths)
    cells = {path: path.replace("/", "\\") if "\\" in form else path for path in paths}
    layout = layout_of(
        tmp_path, "image,split\n" + "".join(f"{form.format(cells[one])},{paths[one]}\n" for one in paths)
    )
    splits = {scan.image.removeprefix(f"{tmp_path}/").removesuffix(".nii.gz"): scan.split for scan in layout.scans}
    assert splits == paths and not layout.left_out


def test_a_path_that_is_not_here_is_no_other_scan_of_that_name(tmp_path):
    touch(tmp_path, "c1", "b/c1", "only")
    layout = layout_of(tmp_path, "image,split\nb/c1.nii.gz,test\nelsewhere/c1.nii.gz,val\nelsewhere/only,val\n")
    assert {scan.scan_id: scan.split for scan in layout.scans} == {"c1": "", "b__c1": "test", "only": "val"}
    assert any("has 1 row (elsewhere/c1.nii.gz) of no scan" in fault.reason for fault in layout.left_out)


def test_a_whole_datasets_table_for_some_of_its_scans(tmp_path):
    """All of one file name: a row is another patient's scan by its folder."""
    touch(tmp_path, "images/p7/ct")
    rows = "".join(f"p{k}/ct.nii.gz,{'val' if k == 7 else 'train'}\n" for k in range(1, 10))
    layout = layout_of(tmp_path, f"image,split\n{rows}")
    assert [scan.split for scan in layout.scans] == ["val"]
    (reason,) = [fault.reason for fault in layout.left_out]
    assert reason.startswith("has 8 rows (p1/ct.nii.gz, ") and reason.endswith("of no scan that is here")
    without = "".join(f"p{k}/ct.nii.gz,test\n" for k in (1, 2, 3))
    with pytest.raises(ValueError, match="no row fits a scan"):
        layout_of(tmp_path, f"image,split\n{without}")


def test_a_row_that_fits_by_its_file_name_alone_is_said(tmp_path):
    touch(tmp_path, "images/p7/ct")
    layout = layout_of(tmp_path, "image,split\np3/ct.nii.gz,test\n")
    assert [scan.split for scan in layout.scans] == ["test"]
    assert [fault.reason for fault in layout.left_out] == [
        "fits 1 row by the file name alone, the folders are others (p3/ct.nii.gz -> p7__ct)"
    ]


@pytest.mark.parametrize(
    "cell, values",
    [
        ("liver", (1,)),
        ("liver left kidney", (1, 2)),
        ("left kidney", (2,)),
        ("kidney left", (3, 4)),
        ("Liver LEFT Kidney", (1, 2)),
        ("liver;left kidney", (1, 2)),
        ("liver | kidney", (1, 3)),
        ('"liver, left kidney"', (1, 2)),
        ("['liver'; 'left kidney']", (1, 2)),
        ("", ()),
    ],
)
def test_organs_with_blanks_in_their_names(labelled, cell, values):
    layout = layout_of(labelled, f"scan_id,labelled_organs\ncase_1,{cell}\ncase_2,\ncase_3,\n", NAMES)
    assert layout.scans[0].labelled == values


# -- dataset.json -----------------------------------------------------------------------------------------------------


def stated(root, labels, start=b"", **more):
    touch(root, "imagesTr/a_0000", "labelsTr/a")
    content = {"channel_names": {"0": "CT"}, "numTraining": 1, "file_ending": ".nii.gz", "labels": labels} | more
    (root / "dataset.json").write_bytes(start + json.dumps(content).encode())
    return read_layout(str(root), LabelsConfig())


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "labels, names",
    [
        ({"background": 0, "liver": 1, "tumour": 2}, {"liver": 1, "tumour": 2}),
        ({"0": "background", "1": "liver", "2": "tumour"}, {"liver": 1, "tumour": 2}),
        ({"background": 0, "liver": [1], "tumour": [2], "ignore": 3}, {"liver": 1, "tumour": 2}),
    ],
)
def test_names_of_a_dataset_json(tmp_path, start, labels, names):
    layout = stated(tmp_path, labels, start)
    assert layout.names == names
    assert layout.scans[0].ignored == labels.get("ignore")


def test_regions_are_refused_with_names_that_work(tmp_path):
    from pgl_ray.config import PrepareConfig, load

    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    with pytest.raises(ValueError, match=r"regions of several values \(whole \[1, 2, 3\], core \[2, 3\]\)") as caught:
        stated(tmp_path, labels)
    mend = str(caught.value).split("value: ")[1].replace("'", "")
    config = load(PrepareConfig, [f"source={tmp_path}", "store=s", mend])
    assert config.labels.names == {"whole_1": 1, "whole_core_2": 2, "enhancing": 3}
    assert read_layout(config.source, config.labels).names == config.labels.names


@pytest.mark.parametrize("labels", [None, [], {"liver": "one"}, {"liver": None}])
def test_labels_that_are_none_are_one_line(tmp_path, labels):
    with pytest.raises(ValueError, match=r"dataset.json: .*labels.names={ORGAN: VALUE}") as caught:
        stated(tmp_path, labels)
    assert "\n" not in str(caught.value)


def test_one_stray_file_costs_no_label(tmp_path):
    touch(tmp_path, "imagesTr/a_0000", "imagesTr/b_0000", "imagesTr/tmp", "labelsTr/a", "labelsTr/b")
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert {scan.scan_id: bool(scan.label) for scan in layout.scans} == {"a": True, "b": True, "tmp": False}
    assert not layout.faults


def test_channel_names_in_a_plain_folder_find_their_labels(tmp_path):
    touch(tmp_path, "images/a_0000", "images/b_0000", "labels/a", "labels/b_0000")
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert all(scan.label for scan in layout.scans) and not layout.faults


@pytest.mark.parametrize("folder", ["imagesTr", "images"])
def test_several_channels_are_one_line(tmp_path, folder):
    touch(tmp_path, *(f"{folder}/{case}_{channel}" for case in "ab" for channel in ("0000", "0001")))
    with pytest.raises(ValueError, match=r"a_0000.nii.gz and a_0001.nii.gz are channels of one scan"):
        read_layout(str(tmp_path), LabelsConfig())


@pytest.mark.parametrize("folder, labels", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_case_numbers_are_no_channels(tmp_path, folder, labels):
    cases = [f"case_{number:04}" for number in range(3)]
    touch(tmp_path, *(f"{folder}/{case}" for case in cases))
    assert [scan.scan_id for scan in read_layout(str(tmp_path), LabelsConfig()).scans] == cases
    touch(tmp_path, *(f"{labels}/{case}" for case in cases))
    scans = read_layout(str(tmp_path), LabelsConfig()).scans
    assert [(scan.scan_id, bool(scan.label)) for scan in scans] == [(case, True) for case in cases]
    touch(tmp_path, f"{labels}/case")
    (tmp_path / labels / "case_0000.nii.gz").unlink()
    (tmp_path / labels / "case_0001.nii.gz").unlink()
    with pytest.raises(ValueError, match="channels of one scan"):
        read_layout(str(tmp_path), LabelsConfig())


def test_segmentations_of_slicer_are_labels(tmp_path):
    touch(tmp_path, "images/a", "images/b")
    for name in ("a.seg.nrrd", "b.nrrd"):
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / name).touch()
    assert all(scan.label for scan in read_layout(str(tmp_path), LabelsConfig()).scans)
