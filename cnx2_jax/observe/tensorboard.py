"""Writes TensorBoard's event files, without TensorFlow.

`tensorboard`'s own EventFileWriter imports TensorFlow where that is installed, and writes from a thread. This
one does neither: an error, such as a full disk, is raised by the call that meets it.
"""

import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

_files_opened = itertools.count()  # two writers of one process and second need different file names


class EventWriter:
    """Appends scalars and images to a new event file, in the format of `tf.summary` of TensorFlow 2.

    Args:
      folder: where the file goes; it is made if it does not exist.

    Raises:
      OSError: from this and every method, if the file cannot be written.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names, so the time comes first.
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files_opened)}"
        self._file = (folder / f"events.out.tfevents.{name}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Appends a number, as float32."""
        tensor = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(), float_val=[value])
        self._add(tag, tensor, "scalars", step)

    def image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """Appends a picture that is encoded as PNG already."""
        values = [str(width).encode(), str(height).encode(), png]
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(values))])
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=values)
        self._add(tag, tensor, "images", step)

    def flush(self) -> None:
        """Hands everything written so far to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _add(self, tag: str, tensor: TensorProto, plugin: str, step: int) -> None:
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
        value = Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
        self._write(Event(step=step, summary=Summary(value=[value])))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
