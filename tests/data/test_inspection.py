"""What `cnx2 data` measures: counts, sizes, and order checks that fail when the order is wrong."""

import itertools

import numpy as np
import pytest
from PIL import Image

from cnx2_jax.data import inspection
from cnx2_jax.data.images import ImageData
from cnx2_jax.data.sizes import image_sizes
from cnx2_jax.tasks import defaults


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for index in range(30):
        path = root / "train" / ("a" if index < 10 else "b") / f"{index:02}.{('png', 'jpg')[index % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 256, (20 + index, 40, 3), np.uint8)
        Image.fromarray(noise).save(path)
    (root / "val" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 8)).save(root / "val" / "a" / "x.png")
    config = defaults("classify")
    config.update({"batch_size": 8, "image_size": (8, 8)})
    config.data.update({"root": str(root)})
    return ImageData(config)


def test_counts_and_sizes(images):
    np.testing.assert_array_equal(inspection.class_counts(images.train), [10, 20])
    np.testing.assert_array_equal(inspection.class_counts(images.val), [1, 0])
    sizes = image_sizes(images.train, 1000)
    assert sorted(sizes.tolist()) == [[20 + index, 40] for index in range(30)]
    few = image_sizes(images.train, 5)
    assert 4 <= len(few) <= 5 and np.ptp(few[:, 0]) > 20


def test_order_checks_hold_for_the_pipeline(images):
    def stream(step, host, hosts):
        return images.train_batches(step, process_index=host, process_count=hosts)

    checks = inspection.order_checks(images.num_train, 0, stream)
    assert len(checks) == 4 and all(checks.values())


def right(step, host, hosts):
    """A stream of the right order, of batches of 8."""
    for number in itertools.count(step):
        positions = np.arange(8 * number, 8 * number + 8).reshape(hosts, -1)
        yield {"image": positions[host] % 251, "label": positions[host] % 7}


def breaks_resuming(stream):
    return lambda step, host, hosts: stream(step + (step == 2), host, hosts)


def breaks_hosts(stream):
    return lambda step, host, hosts: stream(step, hosts - 1 - host, hosts)


@pytest.mark.parametrize(("breaks", "failed"), [(breaks_resuming, "step 2"), (breaks_hosts, "8 hosts")])
def test_order_checks_see_a_wrong_stream(breaks, failed):
    checks = inspection.order_checks(30, 0, breaks(right))
    assert [name for name, holds in checks.items() if not holds] == [n for n in checks if failed in n]


def test_order_checks_see_a_wrong_order(monkeypatch):
    def repeated(epoch, num_records, seed):
        return np.zeros(num_records, np.int64)

    monkeypatch.setattr(inspection, "epoch_order", repeated)
    checks = inspection.order_checks(30, 0, right)
    assert list(checks.values()) == [False, False, True, True]


def test_images_per_second_counts_images():
    batches = itertools.repeat({"image": np.zeros((5, 1, 1, 1))})
    assert inspection.images_per_second(batches, 0.01) > 5
