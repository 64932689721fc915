"""Reads what a run wrote for TensorBoard."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout


def events(folder):
    """All that the event files in a folder hold."""
    accumulator = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    return accumulator.Reload()


def scalars(found, tag):
    """Steps and values of a scalar."""
    return {event.step: event.value for event in found.Scalars(tag)}


def text(found, tag):
    """The last text under a tag."""
    return found.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def layouts(found):
    """The custom layouts, each as {category: {title: (kind, names)}}."""
    read = []
    for event in found.Tensors("custom_scalars__config__"):
        layout = Layout()
        layout.ParseFromString(event.tensor_proto.string_val[0])
        read.append({c.title: {ch.title: _chart(ch) for ch in c.chart} for c in layout.category})
    return read


def _chart(chart):
    if chart.WhichOneof("content") == "multiline":
        return "lines", list(chart.multiline.tag)
    (series,) = chart.margin.series
    return "band", [series.value, series.lower, series.upper]
