"""The persistent split: a validation case never trains in a later round."""

import pytest

from lib.trainers.split import split_cases


def test_first_case_trains_and_shares_are_kept(tmp_path):
    path = tmp_path / "split.json"
    assert split_cases(["a"], 0.2, path) == (["a"], [])
    ids = [f"case{i}" for i in range(20)]
    training, validation = split_cases(["a", *ids], 0.2, path)
    assert len(validation) == 4
    assert sorted(training + validation) == sorted(["a", *ids])
    assert "a" in training


def test_sides_never_change_as_cases_arrive(tmp_path):
    path = tmp_path / "split.json"
    sides: dict[str, str] = {}
    for count in range(1, 40):
        training, validation = split_cases([f"case{i}" for i in range(count)], 0.25, path)
        for side, ids in (("t", training), ("v", validation)):
            for case in ids:
                assert sides.setdefault(case, side) == side


def test_the_order_of_the_list_does_not_matter(tmp_path):
    ids = [f"case{i}" for i in range(10)]
    forward = split_cases(ids, 0.3, tmp_path / "a.json")
    backward = split_cases(ids[::-1], 0.3, tmp_path / "b.json")
    assert set(forward[1]) == set(backward[1])


def test_no_validation_wanted_still_keeps_validation_cases_out_of_training(tmp_path):
    path = tmp_path / "split.json"
    ids = [f"case{i}" for i in range(10)]
    _, validation = split_cases(ids, 0.2, path)
    training, none = split_cases(ids, 0.0, path)
    assert none == []
    assert not set(training) & set(validation)


def test_bad_share_and_bad_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="val_split 1"):
        split_cases(["a"], 1.0, tmp_path / "split.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        split_cases(["a"], 0.2, tmp_path / "broken.json")
