import json
import re
from importlib.metadata import version

import pytest

from bae_lens.storage import Stopwatch, check_folder, check_same, claimed, locked

PURPOSE = {"seed": 0, "training": {"batch_size": 32, "lr_decay": 0.2}, "seeds": (0, 1)}


def claim(folder, purpose=PURPOSE):
    with claimed(folder, purpose):
        pass


def test_stages_add_up_over_runs(tmp_path):
    for _ in range(2):
        Stopwatch(tmp_path).add("train", 2.0)
    with pytest.raises(KeyboardInterrupt), Stopwatch(tmp_path).stage("evaluate"):
        raise KeyboardInterrupt
    stages = Stopwatch(tmp_path).stages
    assert stages["train"].seconds == 4
    assert 0 < stages["evaluate"].seconds < 1
    assert 0.01 < stages["train"].peak_memory_gib < 100


def test_folder_belongs_to_one_run(tmp_path):
    folder = tmp_path / "deep" / "run"
    claim(folder)
    claim(folder)
    assert json.loads((folder / "run.json").read_text()) == {**PURPOSE, "seeds": [0, 1], "version": version("bae-lens")}
    with pytest.raises(ValueError, match=r"holds something else \(seed: 0 there, 1 now\); choose another folder"):
        claim(folder, {**PURPOSE, "seed": 1})
    with pytest.raises(ValueError, match=r"training.batch_size: 32 there, 64 now; seeds.1: 1 there, nothing now"):
        claim(folder, {**PURPOSE, "training": {"batch_size": 64, "lr_decay": 0.2}, "seeds": (0,)})
    with pytest.raises(ValueError, match=r"\(seed: 0 there, nothing now\)"):
        claim(folder, {key: value for key, value in PURPOSE.items() if key != "seed"})
    claim(folder)  # a refused run leaves the folder as it was


@pytest.mark.parametrize(
    ("earlier", "now", "difference"),
    [
        ({"l0": None}, {}, "l0: None there, nothing now"),
        ({}, {"l0": None}, "l0: nothing there, None now"),
        ({"hooks": []}, {}, r"hooks: \[\] there, nothing now"),
        ({"hooks": {}}, {"hooks": []}, r"hooks: {} there, \[\] now"),
    ],
)
def test_nothing_is_another_than_none_or_an_empty_list(tmp_path, earlier, now, difference):
    check_same(earlier, earlier, tmp_path)
    with pytest.raises(ValueError, match=difference):
        check_same(earlier, now, tmp_path)


def test_claim_of_a_run_that_is_refused_is_taken_back_if_nothing_was_kept(tmp_path):
    folder = tmp_path / "deep" / "run"

    def refused(put_there):
        with claimed(folder, PURPOSE):
            put_there()
            raise ValueError("too few")

    with pytest.raises(ValueError, match="too few"):
        refused(lambda: Stopwatch(folder).add("choose contexts", 1.0))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), claimed(folder, PURPOSE):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="too few"):
        refused(lambda: (folder / "contexts").mkdir())
    with pytest.raises(ValueError, match="holds something else"):
        claim(folder, {**PURPOSE, "seed": 1})


def test_folder_of_another_version_is_refused(tmp_path, monkeypatch):
    claim(tmp_path)
    monkeypatch.setattr("bae_lens.storage.version", lambda _: "99.0")
    with pytest.raises(ValueError, match=r"version: '.*' there, '99.0' now"):
        claim(tmp_path)


def test_folder_is_held_by_one_run_at_a_time_and_let_go_at_the_end(tmp_path):
    message = f"another process is at work in {re.escape(str(tmp_path))}; wait for it"
    with claimed(tmp_path, PURPOSE), pytest.raises(ValueError, match=message):
        claim(tmp_path)
    claim(tmp_path)


def test_many_differences_are_counted(tmp_path):
    claim(tmp_path, {"seeds": list(range(9))})
    with pytest.raises(ValueError, match=r"\(seeds.0: 0 there, 1 now; .*; seeds.3: 3 there, 4 now; 5 more\); choose"):
        claim(tmp_path, {"seeds": list(range(1, 10))})


def test_folder_in_use_is_not_taken_by_another_lock(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process is at work in"), locked(tmp_path):
        pass
    with locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_of_a_folder_that_was_locked_for_nothing_nothing_is_left(tmp_path):
    with locked(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "result.json").touch()
    assert (tmp_path / "used" / "result.json").exists()


def test_claim_that_was_killed_can_be_made_again(tmp_path):
    for name in (".lock", ".run.json.17.partial"):
        (tmp_path / name).write_text("")
    claim(tmp_path)


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files of something else"):
        check_folder(tmp_path)
    with pytest.raises(ValueError, match="holds files of something else"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is not writable: check .*file, or choose"):
        check_folder(tmp_path / "file" / "run")
    monkeypatch.setattr("os.access", lambda *_: False)  # what permissions do to anybody but root
    with pytest.raises(ValueError, match="is not writable"):
        check_folder(tmp_path / "run")
