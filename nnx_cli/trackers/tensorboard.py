"""TensorBoard: event files in the run's folder, with what its own writer would add to their names left out."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nnx_cli.errors import quoted
from nnx_cli.trackers._pictures import Picture, picture_of
from nnx_cli.trackers._tracker import TrackedRun


def start(run: TrackedRun) -> TensorBoardRun:
    """Open an event file; those of a run that goes on are one run together."""
    return TensorBoardRun(run)


class TensorBoardRun:
    """A Tracker of TensorBoard. Its writer is not used, for that names files by the host."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = event_pb2, summary_pb2
        self.tensor, self.shape = tensor_pb2, tensor_shape_pb2
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{secrets.token_hex(4)}"
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        self.writer: Any = RecordWriter(os.fdopen(file, "wb"))
        self.place = f"tensorboard --logdir {quoted(run.folder)}"
        self._write(file_version="brain.Event:2")
        rows = "".join(f"| {name} | {value} |\n" for name, value in run.settings.items())
        self._write_text(0, "config", f"| setting | value |\n| --- | --- |\n{rows}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As in Tracker."""
        self._summarize(step, [self.summary.Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """As in Tracker: as code, so that nothing in it is markup."""
        self._write_text(step, "samples", "".join(f"    {line}\n" for line in (prompt + text).splitlines()))

    def figures(self, step: int, figures: Sequence[str]) -> None:
        """As in Tracker: as pictures, for it shows no SVG."""
        shown = [picture for figure in figures if (picture := picture_of(figure)) is not None]
        values = [self.summary.Summary.Value(tag=f"figures/{each.title}", image=self._image(each)) for each in shown]
        self._summarize(step, values)

    def _image(self, picture: Picture) -> Any:
        size = {"width": picture.width, "height": picture.height, "colorspace": 3}
        return self.summary.Summary.Image(encoded_image_string=picture.png, **size)

    def rewind(self, step: int) -> None:
        """As in Tracker: what was written of later steps is not shown."""
        log = self.event.SessionLog(status=self.event.SessionLog.START)
        self._write(step=step + 1, session_log=log)

    def finish(self, exit_code: int) -> None:
        """As in Tracker."""
        self.writer.close()

    def _write_text(self, step: int, tag: str, markdown: str) -> None:
        """Text that TensorBoard shows as Markdown."""
        plugin = self.summary.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self.summary.SummaryMetadata(plugin_data=plugin)
        one = self.shape.TensorShapeProto(dim=[self.shape.TensorShapeProto.Dim(size=1)])
        tensor = self.tensor.TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=one)
        self._summarize(step, [self.summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])

    def _summarize(self, step: int, values: Sequence[Any]) -> None:
        self._write(step=step, summary=self.summary.Summary(value=values))

    def _write(self, **event: Any) -> None:
        self.writer.write(self.event.Event(wall_time=time.time(), **event).SerializeToString())
        self.writer.flush()
