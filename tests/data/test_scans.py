"""Volumes in files: their place in the world stays, bad files are told, phantoms look like what they should."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from convatlas.data.image_files import Unreadable
from convatlas.data.phantoms import phantom
from convatlas.data.scans import Scan, enlarged_affine, read_scan, write_scan
from convatlas.data.volume_sets import PHANTOMS, read_volumes, scan_files
from convatlas.errors import DataError

AFFINE = np.array([[0, -2.0, 0, 30], [1.5, 0, 0.1, -20], [0, 0.2, 3, -10], [0, 0, 0, 1]])


def _values(shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


def _nifti(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, codes: tuple[int, int] = (1, 0)) -> Path:
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a scan"
    image.set_sform(affine, codes[0])
    image.set_qform(affine if codes[1] else None, codes[1])
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("codes", [(1, 0), (4, 1), (0, 2)])
def test_new_voxels_lie_where_the_old_ones_lay(suffix: str, codes: tuple[int, int], tmp_path: Path):
    affine = AFFINE if codes[1] == 0 else np.diag([-1.5, 2, 3, 1.0])
    path = _nifti(tmp_path / f"a{suffix}", _values().astype(np.int16), affine, codes)
    scan = read_scan(path)
    fine = scan.values.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    write_scan(tmp_path / f"b{suffix}", scan, fine, 2)
    before, after = nibabel.load(path), nibabel.load(tmp_path / f"b{suffix}")
    np.testing.assert_allclose(after.header.get_zooms(), np.array(before.header.get_zooms()) / 2, rtol=1e-6)
    assert after.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(after.dataobj), fine)
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == codes
    assert after.header.get_xyzt_units() == ("mm", "sec")
    assert bytes(after.header["descrip"]).startswith(b"a scan")
    apply = nibabel.affines.apply_affine
    # The middle of the eight voxels that one has become, and the corner of the whole volume.
    np.testing.assert_allclose(apply(after.affine, [2.5, 4.5, 6.5]), apply(before.affine, [1, 2, 3]), atol=1e-4)
    np.testing.assert_allclose(apply(after.affine, [-0.5] * 3), apply(before.affine, [-0.5] * 3), atol=1e-4)
    if codes[1]:
        step = enlarged_affine(before.get_qform(), 2, centred=True)
        np.testing.assert_allclose(after.get_qform(), step, atol=1e-4)


def test_picked_voxels_stay_where_they_are():
    apply = nibabel.affines.apply_affine
    fine = enlarged_affine(AFFINE, 4, centred=False)
    np.testing.assert_allclose(apply(fine, [4, 8, 12]), apply(AFFINE, [1, 2, 3]))


def test_upright_is_what_the_closest_canonical_image_is():
    values = _values((3, 4, 5))
    for affine in (AFFINE, np.diag([-1, 2, 3, 1.0]), np.diag([1, -2, -3, 1.0])):
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
        scan = Scan(values, affine)
        expected = np.asarray(canonical.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]
        assert np.array_equal(scan.upright(), expected)
        assert np.shares_memory(scan.upright(), values)
        np.testing.assert_allclose(scan.upright_spacing, canonical.header.get_zooms()[::-1], rtol=1e-5)


def test_arrays_go_in_and_out(tmp_path: Path):
    scan = Scan(_values(), AFFINE)
    fine = scan.values.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    write_scan(tmp_path / "a.npz", scan, fine, 2)
    back = read_scan(tmp_path / "a.npz")
    assert np.array_equal(back.values, fine)
    np.testing.assert_allclose(back.affine, enlarged_affine(AFFINE, 2, centred=True))
    np.testing.assert_allclose(back.spacing, np.array(scan.spacing) / 2)
    write_scan(tmp_path / "a.npy", scan, fine, 2)
    assert np.array_equal(read_scan(tmp_path / "a.npy").values, fine)
    write_scan(tmp_path / "a.nii", scan, fine, 2)  # an array without a header gets a plain one
    np.testing.assert_allclose(nibabel.load(tmp_path / "a.nii").affine, back.affine, rtol=1e-6)
    with pytest.raises(ValueError, match="values must be"):
        write_scan(tmp_path / "b.npy", scan, fine, 4)
    with pytest.raises(ValueError, match=r"path must end in \.nii"):
        write_scan(tmp_path / "b.txt", scan, fine, 2)


def test_bad_files_are_told(tmp_path: Path):
    (tmp_path / "empty.nii").touch()
    (tmp_path / "text.nii.gz").write_text("no volume")
    np.save(tmp_path / "flat.npy", np.zeros((4, 5)))
    np.savez(tmp_path / "other.npz", mask=np.zeros((4, 5, 6)))
    np.savez(tmp_path / "affine.npz", volume=np.zeros((4, 5, 6)), affine=np.eye(3))
    broken = _values()
    broken[0, 0, 0] = np.nan
    _nifti(tmp_path / "nan.nii", broken)
    _nifti(tmp_path / "series.nii", _values((4, 5, 6, 3)))
    for name, reason in (
        ("missing.nii", "there is no such file"),
        ("empty.nii", "the file is empty"),
        ("text.nii.gz", "it is no NIfTI file"),
        ("flat.npy", "three axes are expected"),
        ("other.npz", "must hold an array named volume"),
        ("affine.npz", r"affine must be \(4, 4\)"),
        ("nan.nii", "1 of its voxels are not finite"),
        ("series.nii", "a series of 3 volumes"),
    ):
        with pytest.raises(Unreadable, match=reason):
            read_scan(tmp_path / name)
    _nifti(tmp_path / "one.nii", _values((4, 5, 6, 1)))
    assert read_scan(tmp_path / "one.nii").values.shape == (4, 5, 6)


def test_sets_of_volumes(tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
    _nifti(tmp_path / "set" / "train" / "a.nii.gz", _values())
    np.save(tmp_path / "set" / "test" / "b.npy", _values())
    (tmp_path / "set" / "test" / "notes.txt").write_text("no volume")
    sets = read_volumes(tmp_path / "set")
    assert {split: [entry.name for entry in found.entries] for split, found in sets.items()} == {
        "train": ["train/a.nii.gz"],
        "test": ["test/b.npy"],
    }
    assert sets["test"].skipped[0].path == "test/notes.txt"
    assert np.array_equal(sets["train"].entries[0].read().values, _values())
    np.savez(tmp_path / "many.npz", volumes=np.stack([_values(), 2 * _values()]))
    many = read_volumes(tmp_path / "many.npz")["all"]
    assert len(many) == 2
    assert np.array_equal(many.entries[1].read().values, 2 * _values())
    assert [name for _, name in scan_files([tmp_path / "set"])] == ["test/b.npy", "train/a.nii.gz"]
    assert {split: len(found) for split, found in read_volumes("phantoms").items()} == PHANTOMS
    for source, message in ((tmp_path / "none", "does not exist"), (tmp_path / "set" / "empty", "holds no volume")):
        if source.name == "empty":
            source.mkdir()
        with pytest.raises(DataError, match=message):
            read_volumes(source)
    with pytest.raises(DataError, match="does not exist"):
        scan_files([tmp_path / "none"])


def test_phantoms_are_heads_with_fine_textures():
    volume = phantom(32, np.random.default_rng(1))
    assert (volume.shape, volume.dtype) == ((32, 32, 32), np.float32)
    assert 0 <= volume.min() < 1e-6
    assert 0.8 < volume.max() <= 1
    assert volume[0].max() < 0.05  # nothing at the border
    assert volume[16, 16].max() > 0.6  # the skull
    assert np.array_equal(volume, phantom(32, np.random.default_rng(1)))
    smooth = phantom(32, np.random.default_rng(1), texture=0)
    fine = [np.abs(np.fft.fftn(each))[8:24, 8:24, 8:24].mean() for each in (volume, smooth)]
    assert fine[0] > 1.3 * fine[1]  # above half the highest frequency
    assert phantom((8, 16, 12), np.random.default_rng(0)).shape == (8, 16, 12)
    with pytest.raises(ValueError, match="at least 8 voxels"):
        phantom(7, np.random.default_rng(0))
    with pytest.raises(ValueError, match="texture must not be negative"):
        phantom(8, np.random.default_rng(0), texture=-1)
