"""data_prep/*.yaml: every recipe finds its set's scans, labels and split in a folder of the published layout."""

import os
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pgl_ray.config import LabelsConfig, PrepareConfig, RecipeConfig, load
from pgl_ray.files.layout import read_layout

RECIPES = Path(__file__).resolve().parents[1] / "data_prep"


def names(pattern, *ranges):
    return [pattern.format(number) for low, high in ranges for number in range(low, high + 1)]


def pairs(folder, images, labels, ids):
    return {f"{folder}/{images}/{one}.nii.gz": f"{folder}/{labels}/{one}.nii.gz" for one in ids}


def only(*paths):
    return dict.fromkeys(paths)


def msd(folder, training, test):
    """Volumes as MSD's archives hold them."""
    images = [f"{folder}/imagesTr/{one}.nii.gz" for one in training] + [
        f"{folder}/imagesTs/{one}.nii.gz" for one in test
    ]
    return only(*images)


def kits(low, high):
    return {f"data/{one}/imaging.nii.gz": f"data/{one}/segmentation.nii.gz" for one in names("case_{:05}", (low, high))}


BCV = {
    f"RawData/Training/img/img{one}.nii.gz": f"RawData/Training/label/label{one}.nii.gz"
    for one in names("{:04}", (1, 10), (21, 40))
}
SPLEEN = names("spleen_{}", (2, 42))
AMOS = pairs("amos22", "imagesTr", "labelsTr", names("amos_{:04}", (1, 200)))
AMOS |= pairs("amos22", "imagesVa", "labelsVa", names("amos_{:04}", (201, 300)))
AMOS |= only(*(f"amos22/imagesTs/{one}.nii.gz" for one in names("amos_{:04}", (301, 500))))
RIBFRAC = [
    *(f"ribfrac-train-images-1/Part1/RibFrac{n}-image.nii.gz" for n in range(1, 301)),
    *(f"ribfrac-train-images-2/Part2/RibFrac{n}-image.nii.gz" for n in range(301, 421)),
    *(f"ribfrac-val-images/RibFrac{n}-image.nii.gz" for n in range(421, 501)),
    *(f"ribfrac-test-images/RibFrac{n}-image.nii.gz" for n in range(501, 661)),
]
# recipe -> published volumes and their label maps, other files next to them, scans per split
SETS = {
    "ribfrac": (only(*RIBFRAC), ["ribfrac-train-labels-1/Part1/RibFrac1-label.nii.gz"], {"": 660}),
    "msd_hepaticvessel": (
        msd("Task08_HepaticVessel", names("hepaticvessel_{:03}", (1, 303)), names("hepaticvessel_{:03}", (304, 443))),
        ["Task08_HepaticVessel/labelsTr/hepaticvessel_001.nii.gz"],
        {"": 443},
    ),
    "msd_colon": (msd(".", names("colon_{:03}", (1, 126)), names("colon_{:03}", (127, 190))), [], {"": 190}),
    "msd_pancreas": (msd("a/b", names("pancreas_{:03}", (1, 281)), names("pancreas_{:03}", (282, 420))), [], {"": 420}),
    "msd_lung": (msd("Task06_Lung", names("lung_{:03}", (1, 63)), names("lung_{:03}", (64, 95))), [], {"": 95}),
    "msd_liver": (
        pairs("Task03_Liver", "imagesTr", "labelsTr", names("liver_{}", (0, 130))),
        ["Task03_Liver/imagesTs/liver_132.nii.gz", "Task03_Liver/imagesTr/._liver_3.nii.gz"],
        {"train": 66, "test": 65},
    ),
    "msd_spleen": (pairs("Task09_Spleen", "imagesTr", "labelsTr", SPLEEN), [], {"train": 20, "test": 21}),
    "kits19": (kits(0, 209), ["data/case_00210/imaging.nii.gz"], {"train": 105, "test": 105}),
    "bcv": (BCV, ["RawData/Testing/img/img0061.nii.gz"], {"train": 15, "test": 15}),
    "amos22": (AMOS, ["amos22/imagesTr/amos_0507.nii.gz"], {"train": 200, "test": 100, "": 200}),
}


def touch(root, files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def layout_of(recipe, root, *args):
    config = load(PrepareConfig, [str(RECIPES / f"{recipe}.yaml"), f"source={root}", f"store={root}/s", *args])
    return read_layout(config.source, config.labels, config.recipe, config.series)


@pytest.mark.parametrize("recipe", SETS)
def test_the_whole_set_comes_with_its_labels_and_split(tmp_path, recipe):
    files, others, splits = SETS[recipe]
    touch(tmp_path, [*files, *filter(None, files.values()), *others])
    layout = layout_of(recipe, tmp_path)
    scans = {str(Path(scan.image).relative_to(tmp_path)): scan for scan in layout.scans}
    assert scans.keys() == {str(Path(name)) for name in files} and not layout.faults and not layout.missing
    for name, label in files.items():
        assert scans[str(Path(name))].label == (label and str(tmp_path / label))
    assert Counter(scan.split for scan in layout.scans) == splits
    assert len({scan.scan_id for scan in layout.scans}) == len(files)
    num_visible = sum(not Path(name).name.startswith(".") for name in others)
    assert [fault.reason for fault in layout.left_out] == ["a volume that the recipe has no use for"] * num_visible


@pytest.mark.parametrize("recipe", [name for name, (files, *_) in SETS.items() if any(files.values())])
def test_what_is_missing_is_said(tmp_path, recipe):
    files, _, splits = SETS[recipe]
    present = {name: label for k, (name, label) in enumerate(files.items()) if k != 3}
    maps = [label for label in present.values() if label]
    touch(tmp_path, [*present, *maps[1:]])
    layout = layout_of(recipe, tmp_path)
    number = len(files) if "" not in splits else 200
    lines = "\n".join(layout.missing)
    assert f"{number - 1} of {number} scans" in lines and "get the others: " in lines
    assert "1 label maps " in lines and "; get them: " in lines
    if "" not in splits:
        assert "the split is drawn from the labelled scans that are there" in lines
    if recipe == "kits19":
        assert "(case_00003 not there)" in lines


def test_msds_other_tasks_beside_a_set_are_not_taken(tmp_path):
    tasks = ("hepaticvessel", "colon", "pancreas", "lung", "spleen", "liver")
    ids = {task: [Path(name).name[:-7] for name in SETS[f"msd_{task}"][0]] for task in tasks}
    for task in tasks:
        touch(tmp_path / task, [f"{folder}/{one}.nii.gz" for folder in ("imagesTr", "labelsTr") for one in ids[task]])
    for task in tasks[:-1]:
        assert sorted(scan.scan_id for scan in layout_of(f"msd_{task}", tmp_path).scans) == sorted(ids[task])


def test_more_scans_than_the_set_has_are_said(tmp_path):
    touch(tmp_path, [name for pair in SETS["msd_spleen"][0].items() for name in pair])
    assert not layout_of("msd_spleen", tmp_path).missing
    touch(tmp_path, ["more/imagesTr/spleen_900.nii.gz", "more/labelsTr/spleen_900.nii.gz"])
    layout = layout_of("msd_spleen", tmp_path)
    assert "42 scans **/imagesTr/spleen_{id}.nii.gz found, MSD Task09 Spleen has 41" in layout.missing[0]


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"no scan of MSD Task09 Spleen in it, expected \*\*/imagesTr/spleen_\{id\}"):
        layout_of("msd_spleen", tmp_path)


def test_the_draw_is_fixed_and_a_missing_scan_hardly_moves_it(tmp_path):
    files = [name for pair in SETS["msd_liver"][0].items() for name in pair]
    touch(tmp_path / "all", files)
    touch(tmp_path / "less", [name for name in files if "liver_77." not in name])
    one, two = (
        {scan.scan_id: scan.split for scan in layout_of("msd_liver", tmp_path / d).scans} for d in ("all", "less")
    )
    assert one == {scan.scan_id: scan.split for scan in layout_of("msd_liver", tmp_path / "all").scans}
    first = [key for key in sorted(one) if one[key] == "train"][:5]
    assert first == ["liver_10", "liver_100", "liver_101", "liver_105", "liver_107"]  # as every release must draw it
    assert sum(one[key] != two[key] for key in two) <= 1
    other = layout_of("msd_liver", tmp_path / "all", "recipe.split_seed=1")
    assert sum(one[scan.scan_id] != scan.split for scan in other.scans) > 30


def nnunet(root, num_train, num_test):
    """A folder of nnU-Net with label maps of all scans, and of more that have none."""
    for end, num in (("Tr", num_train), ("Ts", num_test)):
        ids = [f"{end.lower()}{k}" for k in range(num)]
        touch(root, [*(f"images{end}/{one}_0000.nii.gz" for one in ids), *(f"labels{end}/{one}.nii.gz" for one in ids)])
        touch(root, [f"images{end}/bare{end}_0000.nii.gz"])


@pytest.mark.parametrize(
    "sizes, num_train, num_test, drawn, said",
    [
        ({"train": 3, "validation": 2}, 5, 3, {"train": 3, "validation": 2, "test": 3}, False),
        ({"validation": 2, "train": 1}, 5, 1, {"train": 3, "validation": 2, "test": 1}, False),
        ({"train": 2, "test": 3}, 5, 2, {"train": 2, "test": 5}, False),
        ({"train": 4, "validation": 3}, 4, 3, {"train": 4, "test": 3}, True),
        ({"train": 4, "validation": 3}, 4, 0, {"train": 4}, False),
    ],
)
def test_scans_of_a_test_folder_are_not_drawn(tmp_path, sizes, num_train, num_test, drawn, said):
    nnunet(tmp_path, num_train, num_test)
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1}), RecipeConfig(name="x", split_sizes=sizes))
    labelled = [scan for scan in layout.scans if scan.label]
    assert Counter(scan.split for scan in labelled) == drawn
    assert {scan.split for scan in labelled if "imagesTs" in scan.image} <= {"test"}
    assert layout.missing == said * [
        "recipe.split_sizes={'train': 4, 'validation': 3} draws 7 scans, 4 with labels can be drawn: 3 scans of a test "
        "folder stay test"
    ]


def test_a_part_of_test_scans_is_not_drawn(tmp_path):
    files = [f"{folder}/{k}.nii.gz" for folder in ("one", "two") for k in (f"{folder}{n}" for n in range(4))]
    touch(tmp_path, [*files, *(f"labels/{name.split('/')[1]}" for name in files)])
    parts = [{"images": f"{folder}/{{id}}.nii.gz", "labels": "labels/{id}.nii.gz"} for folder in ("one", "two")]
    recipe = RecipeConfig(name="x", parts=(parts[0], parts[1] | {"split": "test"}), split_sizes={"train": 8})
    splits = {scan.scan_id: scan.split for scan in read_layout(str(tmp_path), LabelsConfig(), recipe).scans}
    assert splits == {f"one{k}": "train" for k in range(4)} | {f"two{k}": "test" for k in range(4)}


def test_a_copy_of_a_scan_is_wrong_use(tmp_path):
    touch(tmp_path, ["a/imagesTr/spleen_2.nii.gz", "b/imagesTr/spleen_2.nii.gz"])
    with pytest.raises(ValueError, match=r"a/imagesTr/spleen_2.nii.gz and .*spleen_2.nii.gz are of one name"):
        layout_of("msd_spleen", tmp_path)


def test_wrong_use():
    with pytest.raises(ValueError, match=r"recipe.parts: pattern 'imagesTr/\*' has no \{id\}"):
        load(PrepareConfig, ["source=a", "store=b", "recipe.parts=[{images: imagesTr/*}]"])
    with pytest.raises(ValueError, match=r"series=\['thin'\]: a recipe says where its scans lie"):
        layout_of("msd_spleen", RECIPES, "series=thin")
    with pytest.raises(ValueError, match=r"unknown key 'recipe.parts.0.image'; known here: ids, images, labels, num"):
        load(PrepareConfig, ["source=a", "store=b", "recipe.parts=[{images: '{id}', image: x}]"])


def test_nnunets_raw_layout(tmp_path):
    touch(tmp_path, ["imagesTr/a_0000.mha", "labelsTr/a.mha", "imagesTs/b_0000.mha"])
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}}')
    layout = layout_of("nnunet", tmp_path)
    assert [(scan.scan_id, bool(scan.label), scan.split) for scan in layout.scans] == [
        ("a", True, "train"),
        ("imagesTs__b", False, "test"),
    ]
    assert layout.names == {"liver": 1} and not layout.missing


# -- a mask per organ -------------------------------------------------------------------------------------------------


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.5, -1.5, 3, 1])), path)


def mask_folder(root, scans, organs):
    ct = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
    for scan in scans:
        put(root / scan / "ct.nii.gz", ct)
        for k, organ in enumerate(organs):
            mask = np.zeros(ct.shape, np.uint8)
            mask[:, :, k : k + 2] = 1
            put(root / scan / "segmentations" / f"{organ}.nii.gz", mask)


def test_totalsegmentator(tmp_path):
    mask_folder(tmp_path, ["s0000", "s0001"], ["spleen", "costal_cartilages"])
    put(tmp_path / "s0001/segmentations/liver.nii.gz", np.zeros((8, 9, 10), np.uint8))
    put(tmp_path / "s0001/segmentations/face.nii.gz", np.zeros((8, 9, 10), np.uint8))  # of version 1
    (tmp_path / "meta.csv").write_text("image_id;age;split\ns0000;60;val\ns0001;3;train\n")
    layout = layout_of("totalsegmentator", tmp_path)
    assert [(scan.scan_id, scan.split, scan.labelled) for scan in layout.scans] == [
        ("s0000", "val", (1, 117)),
        ("s0001", "train", (1, 5, 117)),  # the liver is annotated and not in the picture
    ]
    assert len(layout.names) == 117 and "1226" not in layout.missing[0] and "2 of 1228 scans" in layout.missing[0]
    (left,) = layout.left_out
    assert left == (str(tmp_path / "s0001/segmentations/face.nii.gz"), "a volume that the recipe has no use for")
    assert len(layout.scans[1].files()) == 4
    label = layout.scans[0].read(layout.names)[1]
    assert label.dtype == np.uint8 and label.shape == (10, 9, 8)
    assert label[:, 0, 0].tolist() == [1, 117, 117, *[0] * 7]  # the larger value stands where masks overlap


def test_abdomenatlas(tmp_path):
    mask_folder(tmp_path, ["BDMAP_00000001"], ["aorta", "stomach"])
    put(tmp_path / "BDMAP_00000001/combined_labels.nii.gz", np.zeros((8, 9, 10), np.uint8))
    (scan,) = layout_of("abdomenatlas", tmp_path).scans
    assert (scan.scan_id, scan.split, scan.labelled) == ("BDMAP_00000001", "train", (1, 9))
    put(tmp_path / "BDMAP_00000001/segmentations/aorta.nii.gz", np.arange(720).reshape(8, 9, 10).astype(np.int16))
    with pytest.raises(ValueError, match=r"aorta.nii.gz: values up to 719, expected a mask of one organ \(0 and 1\)"):
        scan.read({"aorta": 1, "stomach": 9})


def own_recipe(root, *args):
    return layout_of("nnunet", root, "recipe.prefix=", "recipe.split_sizes={}", *args)


@pytest.mark.parametrize("labels", ["masks/{organ}/{id}.nii.gz", "{id}/{organ}/mask.nii.gz", "{organ}/seg_{id}.nii.gz"])
def test_each_mask_is_read_from_its_own_folder(tmp_path, labels):
    names = {"liver": 1, "spleen": 2, "aorta": 3}
    ct = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
    for case, organs in {"c1": ("liver", "spleen"), "c2": ("aorta",)}.items():
        put(tmp_path / f"img/{case}.nii.gz", ct)
        for organ in organs:
            mask = np.zeros(ct.shape, np.uint8)
            mask[names[organ]] = 1
            put(tmp_path / labels.format(organ=organ, id=case), mask)
    part = "recipe.parts=[{images: 'img/{id}.nii.gz', labels: '" + labels + "', split: train}]"
    layout = own_recipe(tmp_path, part, *(f"labels.names.{organ}={value}" for organ, value in names.items()))
    assert not layout.faults and not layout.left_out
    for scan, values in zip(layout.scans, ({1, 2}, {3})):
        label = scan.read(names).label
        assert scan.labelled == tuple(sorted(values)) and set(np.unique(label)) == {0, *values}
        assert all((label[:, :, value] == value).all() for value in values)
        assert len(scan.files()) == 1 + len(values) and all(file.is_file() for file in scan.files())


def test_scans_of_two_parts_with_one_id_are_named(tmp_path):
    touch(tmp_path, ["imagesTr/c1.nii.gz", "labelsTr/c1.nii.gz", "imagesTs/c1.nii.gz"])
    train = "{images: 'imagesTr/{id}.nii.gz', labels: 'labelsTr/{id}.nii.gz', split: train}"
    layout = own_recipe(tmp_path, f"recipe.parts=[{train}, {{images: 'imagesTs/{{id}}.nii.gz', split: test}}]")
    assert [(scan.scan_id, scan.split, bool(scan.label)) for scan in layout.scans] == [("c1", "train", True)]
    (fault,) = layout.faults
    assert fault.source.endswith("imagesTs/c1.nii.gz") and "imagesTr/c1.nii.gz, too: rename one" in fault.reason


def test_what_the_walk_cannot_look_at_is_said_with_a_recipe_too(tmp_path):
    touch(tmp_path, ["imagesTr/a.nii.gz", "imagesTr/.b.nii.gz"])
    Path(os.fsdecode(bytes(tmp_path / "imagesTr") + b"/c\xfc.nii.gz")).touch()
    part = "recipe.parts=[{images: 'imagesTr/{id}.nii.gz', split: train}]"
    plain, layout = read_layout(str(tmp_path), LabelsConfig()), own_recipe(tmp_path, part)
    assert plain.faults and plain.left_out
    assert layout.faults == plain.faults and layout.left_out == plain.left_out


def test_an_organ_without_a_mask_is_unlabelled_by_a_table_too(tmp_path):
    names = {"liver": 1, "spleen": 2, "kidney": 3}
    touch(tmp_path, ["img/c1.nii.gz", "img/c2.nii.gz", "seg/c1/liver.nii.gz", "seg/c1/spleen.nii.gz"])
    touch(tmp_path, ["seg/c1/kidney.nii.gz", "seg/c2/liver.nii.gz"])
    (tmp_path / "seg/c2/spleen.nii.gz").symlink_to("gone.nii.gz")
    (tmp_path / "t.csv").write_text("id,labelled_organs\nc1,liver kidney\nc2,liver spleen kidney\n")
    part = "recipe.parts=[{images: 'img/{id}.nii.gz', labels: 'seg/{id}/{organ}.nii.gz', split: train}]"
    values = [f"labels.names.{organ}={value}" for organ, value in names.items()]
    layout = own_recipe(tmp_path, part, "labels.table=t.csv", *values)
    assert [scan.labelled for scan in layout.scans] == [(1, 3), (1,)]
    (note,) = [fault.reason for fault in layout.left_out if "lists" in fault.reason]
    assert note == "t.csv lists spleen, kidney, of which it has no mask: unlabelled"
    assert [fault.reason for fault in layout.faults] == ["a link to a file that is not there"]
