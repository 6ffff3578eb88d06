"""Bands of images: their names, which of them a run uses, and the file of their statistics."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.files import to_path

# What batches hold: dtypes of at most 16 bits as they are, all others as float32.
BATCH_DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
BYTE_RANGE = 255  # data.mean and data.std are shares of it for uint8, and raw values for all others


def batch_dtype(dtype: str) -> str:
    """Returns the name of the dtype in which arrays of `dtype` are moved, resized and batched."""
    return dtype if dtype in BATCH_DTYPES else "float32"


def split_names(text: str, key: str) -> tuple[str, ...]:
    """Returns the names in a list with commas; none for the empty text.

    Raises:
      UserError: a name of the config key `key` is empty or given twice.
    """
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None or "" in names:
        raise UserError(f"{key} '{text}' must be different names with commas between them, such as B2,B3,B4")
    return names


def places_of(names: Sequence[str], known: Sequence[str], key: str) -> tuple[int, ...]:
    """Returns the place of each name in `known`.

    Raises:
      UserError: the config key `key` has a name that is not known.
    """
    for name in names:
        if name not in known:
            raise UserError(f"{key}: unknown band '{name}'{nearest(name, known)}; bands: {', '.join(known)}")
    return tuple(known.index(name) for name in names)


def all_names(data: Any, count: int) -> tuple[str, ...]:
    """Returns the names of the bands in the files: `data.bands`, or else 1, 2 and so on.

    Args:
      data: `config.data`.
      count: how many bands there are.

    Raises:
      UserError: `data.bands` has another number of names.
    """
    names = split_names(data.bands, "data.bands") or tuple(str(place + 1) for place in range(count))
    if len(names) != count:
        raise UserError(f"data.bands names {len(names)} bands, but the arrays have {count}; name all")
    return names


def used_names(data: Any, count: int) -> tuple[str, ...]:
    """Returns the names of the bands that the network gets.

    Args:
      data: `config.data`.
      count: how many those are, `model.in_chans`.

    Raises:
      UserError: they are not `count`; see `split_names`.
    """
    names = split_names(data.use_bands, "data.use_bands") or split_names(data.bands, "data.bands")
    if names and len(names) != count:
        raise UserError(
            f"model.in_chans is {count}, but {len(names)} bands are used; set model.in_chans={len(names)}, "
            f"or choose {count} with data.use_bands"
        )
    return names or tuple(str(place + 1) for place in range(count))


@dataclasses.dataclass(frozen=True)
class BandStatistics:
    """Statistics of each band over a sample of images, in raw units; bad values are left out.

    Attributes:
      dtype: of the arrays.
      names: of the bands.
      images: how many images were read.
      mean, std: of all values; std is that of the population, as NumPy's.
      low, high: percentiles 2 and 98.
      least, most: the extremes.
      bad: the share of values that are not finite, or `data.no_data`.
    """

    dtype: str
    names: tuple[str, ...]
    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]
    bad: tuple[float, ...]

    def constant(self) -> tuple[str, ...]:
        """Returns the names of the bands whose deviation is 0."""
        return tuple(name for name, std in zip(self.names, self.std, strict=True) if not std > 0)

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def read_statistics(path: Path) -> BandStatistics:
    """Reads the file that `cnx2 data --statistics` writes.

    Raises:
      UserError: it cannot be read or is another file.
    """
    try:
        values = json.loads(path.read_text())
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        found = BandStatistics(**fields)
        per_band = (found.mean, found.std, found.low, found.high, found.least, found.most, found.bad)
        if found.names and all(len(each) == len(found.names) for each in per_band):
            return found
    except OSError as error:
        raise UserError(
            f"data.statistics '{path}' cannot be read: {error.strerror}; write it by `cnx2 data --statistics`"
        ) from None
    except (ValueError, TypeError, AttributeError):
        pass
    raise UserError(f"data.statistics '{path}' is not a file that `cnx2 data --statistics` writes")


def take_statistics(data: Any) -> None:
    """Sets `bands`, `dtype`, `mean` and `std` of `config.data` from the file `data.statistics`, if it is set.

    Raises:
      UserError: see `read_statistics`; the file has other bands than `data.bands`; a used band is constant.
    """
    if not data.statistics:
        return
    path = to_path(data.statistics).expanduser()
    found = read_statistics(path)
    names = split_names(data.bands, "data.bands")
    if names and names != found.names:
        raise UserError(
            f"data.statistics '{path}' is of the bands {', '.join(found.names)}, and data.bands names "
            f"{', '.join(names)}; write it anew"
        )
    used = split_names(data.use_bands, "data.use_bands") or found.names
    places = places_of(used, found.names, "data.use_bands")
    constant = next((name for name in used if name in found.constant()), None)
    if constant is not None:
        value = found.mean[found.names.index(constant)]
        raise UserError(
            f"data.statistics '{path}': band '{constant}' has the deviation 0, as all its values are "
            f"{value:g}; leave it out with data.use_bands"
        )
    data.bands = ",".join(found.names)
    data.dtype = batch_dtype(found.dtype)
    unit = BYTE_RANGE if data.dtype == "uint8" else 1
    data.mean = tuple(found.mean[place] / unit for place in places)
    data.std = tuple(found.std[place] / unit for place in places)
