"""The record of a job, as it is read again."""

import json

import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.launch import job as record


@pytest.fixture
def written(tmp_path):
    """A job whose record is in its folder."""
    job = record.Job(
        folder=tmp_path / "digits",
        name="digits",
        backend="tpu-vm",
        command=["true"],
        commit="0" * 40,
        repository=tmp_path,
        env=[],
        options={"zone": "a"},
        retries=0,
        backoff=1,
        grace=1,
    )
    job.folder.mkdir()
    job.write()
    return job


def test_a_record_gives_the_job_again(written):
    assert record.read(written.folder) == written
    assert record.read(written.folder.parent) is None


def test_a_record_of_another_name_is_refused(written):
    # The name is a part of shell commands.
    path = written.folder / "job.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": "digits/log; true"}))
    with pytest.raises(
        UserError, match=r"job.json' is damaged: it is of job 'digits/log; true'; remove '.*digits'"
    ):
        record.read(written.folder)
