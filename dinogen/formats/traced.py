"""Generators as graphs that run without dinogen: torch.export's ``.pt2``, and ONNX."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dinogen.errors import UserError
from dinogen.families.abilities import graph_of
from dinogen.families.base import Graph
from dinogen.files import write_bytes
from dinogen.training.checkpointing.export import Generator

# Of ONNX; runtimes since 2023 have it.
OPSET = 20
# The file of a .pt2 and the key of an ONNX model's metadata that hold the info.
INFO_FILE, INFO_KEY = "dinogen.json", "dinogen"
# Largest difference from the network, over the largest magnitude and at least 1.
TOLERANCE = 1e-4
# What one protobuf message holds.
ONNX_LIMIT = 2**31
_NUM_CHECKED = 3

Inputs = dict[str, Tensor]


class ExportError(UserError):
    """A graph that cannot be written, or that does not compute what the network does."""


def takes(generator: Generator) -> bool:
    """Whether the family says what its graph is."""
    return _graph(generator) is not None


def write_torch_export(generator: Generator, path: Path) -> float:
    """Write a generator as a program of ``torch.export``, once it was seen to compute the same.

    ``torch.export.load`` reads it back, without dinogen; its batch is of any size. ``INFO_FILE``
    among its extra files holds the info as JSON, and with it :func:`described` as ``graph``.

    Args:
        generator: its graph is written, see :class:`dinogen.families.abilities.HasGraph`.
        path: the file.

    Returns:
        The largest difference between file and network, see :func:`checked`.

    Raises:
        ExportError: they differ; nothing is written.
    """
    graph = _graph(generator)
    assert graph is not None
    with _quiet():
        file = io.BytesIO()
        torch.export.save(_program(graph), file, extra_files={INFO_FILE: _info(generator, graph)})
        file.seek(0)
        loaded = torch.export.load(file).module()
        difference = checked(graph, lambda inputs: loaded(*inputs.values()), path)
    write_bytes(path, file.getvalue())
    return difference


def write_onnx(generator: Generator, path: Path) -> float:
    """Write a generator as one ONNX file of opset ``OPSET``, once it was seen to compute the same.

    Args:
        generator: as in :func:`write_torch_export`; ``INFO_KEY`` of the model's metadata holds its
            info.
        path: the file.

    Returns:
        The largest difference between onnxruntime and network, see :func:`checked`.

    Raises:
        ExportError: a package is missing, the weights do not fit into one file, or onnxruntime
            gives something else; nothing is written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx writes with it
    except ImportError as error:
        raise ExportError(f"--format onnx: {error}: pip install 'dinogen[onnx]'") from None
    size = sum(t.numel() * t.element_size() for t in generator.network.state_dict().values())
    if size >= ONNX_LIMIT:
        raise ExportError(
            f"{path}: {size / 2**30:.1f} GiB of weights, and an ONNX file holds less than 2: give "
            "--format torch-export or safetensors"
        )
    graph = _graph(generator)
    assert graph is not None
    program = _program(graph)
    with _quiet():
        written = torch.onnx.export(
            program,
            program.example_inputs[0],
            dynamo=True,
            verbose=False,
            input_names=list(graph.inputs(torch.arange(1), 0)),
            output_names=[graph.output],
            opset_version=OPSET,
        )
        assert written is not None
        model = written.model_proto
        for node in model.graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
        entry = model.metadata_props.add()
        entry.key, entry.value = INFO_KEY, _info(generator, graph)
        data = model.SerializeToString()
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def run(inputs: Inputs) -> Tensor:
            given = {name: value.numpy() for name, value in inputs.items()}
            return torch.from_numpy(session.run(None, given)[0])

        difference = checked(graph, run, path)
    write_bytes(path, data)
    return difference


def _graph(generator: Generator) -> Graph | None:
    return graph_of(generator.family, generator.networks)


def _info(generator: Generator, graph: Graph) -> str:
    return json.dumps(generator.info | {"graph": described(graph)}, allow_nan=False)


def described(graph: Graph) -> dict[str, Any]:
    """Inputs (type, and shape with N for the batch) and output of a graph, and its facts."""
    examples = graph.inputs(torch.arange(2), 0)
    return {
        "inputs": {
            name: {
                "type": str(value.dtype).removeprefix("torch."),
                "shape": ["N", *value.shape[1:]] if value.dim() else [],
            }
            for name, value in examples.items()
        },
        "output": graph.output,
        **graph.facts,
    }


@torch.no_grad()
def checked(graph: Graph, run: Callable[[Inputs], Tensor], path: Path) -> float:
    """How far what was made of a graph is from it, for 1 sample and for several.

    Args:
        graph: computed on the CPU, in float32.
        run: computes the same from inputs on the CPU.
        path: the file, for the message.

    Returns:
        The largest difference of any value, over the largest magnitude and at least 1.

    Raises:
        ExportError: it is above ``TOLERANCE``.
    """
    module, differences = _on_cpu(graph.module), []
    for indices in (torch.arange(1), torch.arange(_NUM_CHECKED)):
        inputs = _inputs(graph, indices)
        expected = module(*inputs.values())
        scale = expected.abs().max().clamp(min=1)
        differences.append(float((run(inputs) - expected).abs().max() / scale))
    difference = max(differences)
    if not all(one <= TOLERANCE for one in differences):  # NaN is above it too
        raise ExportError(
            f"{path}: not written: what was exported differs from the network by {difference:.2g}, "
            f"and {TOLERANCE:g} are allowed: give another --format"
        )
    return difference


@torch.no_grad()
def _program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph with weights on the CPU and a batch of any size."""
    examples = _inputs(graph, torch.arange(2))
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if value.dim() else None for value in examples.values())
    with _quiet():
        program: torch.export.ExportedProgram = torch.export.export(
            _on_cpu(graph.module), tuple(examples.values()), dynamic_shapes=shapes
        ).run_decompositions(_REWRITTEN)
    # Lines of source with folders of this machine, and addresses in its memory.
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
                node.meta.pop("from_node", None)
    return program


def _on_cpu(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().eval()


def _inputs(graph: Graph, indices: Tensor) -> Inputs:
    return {name: value.cpu() for name, value in graph.inputs(indices, 0).items()}


def _pooled(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """``avg_pool2d`` by a divisor of its own, which torch.onnx leaves out without a word."""
    if divisor_override is None:
        return NotImplemented
    means = torch.ops.aten.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, True)
    return means * (math.prod(kernel_size) / divisor_override)


def _transposed(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor, None, None]:
    """``convolution_backward`` to the maps, which runtimes know as a transposed convolution."""
    assert wanted == [True, False, False] and not transposed
    rest = [
        int(x.shape[2 + i])
        - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i])
        - (dilation[i] * (weight.shape[2 + i] - 1) + 1)
        for i in range(2)
    ]
    found: Tensor = torch.ops.aten.convolution(
        gradient, weight, None, stride, padding, dilation, True, rest, groups
    )
    return found, None, None


# Operations of the networks that other runtimes lack, by ones that they have.
_REWRITTEN: Any = {
    torch.ops.aten.avg_pool2d.default: _pooled,
    torch.ops.aten.convolution_backward.default: _transposed,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporters tell of their own steps."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
