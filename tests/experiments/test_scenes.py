"""The study of scenes: what it trains, its table and picture, and that it resumes."""

import json

import pytest

from cnx2_jax.configuration import load_config
from experiments import scenes


def trained(verb, *arguments):
    """Stands in for `cnx2 train`: checks the config and leaves behind what a run would."""
    options = [str(each) for each in arguments]
    workdir, recipe = (options[options.index(name) + 1] for name in ("--workdir", "--config"))
    config = load_config(recipe, [each for each in options if each.startswith("--config.")])
    assert verb == "train"
    score = 0.5 + 0.01 * config.seed + (0.2 if "fcmae" in workdir else 0)
    assert config.get("init_from", "").endswith("pretrained") == ("fcmae" in workdir)
    names = {name for metrics in scenes.METRICS.values() for name in metrics}
    rows = [{"step": step, "split": "val", **dict.fromkeys(names, score)} for step in (5, 10)]
    folder = scenes.Path(workdir)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text("{}")


@pytest.mark.parametrize("task", scenes.METRICS)
def test_the_study_compares_its_arms_and_resumes(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scenes, "cnx2", trained)
    arguments = [task, "--out", str(tmp_path), "--seeds", "1", "3"]
    assert scenes.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])["results"]
    assert [row["metric"] for row in found] == list(scenes.METRICS[task])
    assert found[0]["scratch"] == pytest.approx([0.51, 0.53]) and found[0]["gain"] == pytest.approx(0.2)
    assert found[0]["gain_standard_error"] == pytest.approx(0, abs=1e-9)
    assert "0.720 ± 0.010 | 0.520 ± 0.010 | 0.200 ± 0.000" in printed
    assert (tmp_path / task / "curves.png").is_file()

    monkeypatch.setattr(scenes, "cnx2", lambda *arguments: pytest.fail(f"trains again: {arguments}"))
    assert scenes.main(arguments) == 0
    assert capsys.readouterr().out == printed
    assert scenes.main(arguments[:-1]) == 0
    alone = capsys.readouterr().out
    assert (
        "±" not in alone and json.loads(alone.splitlines()[-1])["results"][0]["gain_standard_error"] is None
    )


def test_an_unknown_task(tmp_path, capsys):
    assert scenes.main(["classify", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "classify" in line and not (tmp_path / "out").exists()
