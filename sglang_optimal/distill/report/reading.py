"""A run's files: what run.json says, and the stored rows in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.records import schema
from sglang_optimal.distill.store import read_rows

if TYPE_CHECKING:
    import pyarrow


@dataclasses.dataclass
class RunInfo:
    """What run.json says, of all machines.

    Attributes:
        name: of the folder.
        config: the settings of the run; {} when not known.
        method: how alpha was solved; None: left to the server.
        alpha_min, alpha_max: bounds on the solved alpha. fixed_alpha: of the method ``fixed``.
        filters: labels in their order.
        states: of all machines. planned, failed: samples. elapsed: seconds of sampling, summed over machines.
        started: the earliest start.
    """

    name: str
    config: dict[str, Any]
    method: str | None
    alpha_min: float
    alpha_max: float
    fixed_alpha: float | None
    filters: list[str]
    states: set[str]
    machines: int
    planned: int
    failed: int
    elapsed: float
    started: str | None

    @classmethod
    def read(cls, folder: Path) -> RunInfo:
        """Raises ValueError: a run.json is damaged."""
        manifests = read_manifests(folder)
        config: dict[str, Any] = next((m["config"] for m in manifests if m.get("config")), {})
        mixing = config.get("mixing") or {}
        fixed = mixing.get("fixed_alpha")
        filters = next((m["filters"] for m in manifests if m.get("filters")), None)
        if filters is None:
            filters = [f.get("name") or f.get("type") or "?" for f in config.get("filters") or []]
        return cls(
            name=folder.resolve().name,
            config=config,
            method="fixed" if fixed is not None else mixing.get("alpha_method"),
            alpha_min=_given(mixing.get("alpha_min"), 0.0),
            alpha_max=_given(mixing.get("alpha_max"), 1.0),
            fixed_alpha=fixed,
            filters=filters,
            states={m["state"] for m in manifests if m.get("state")},
            machines=len(manifests),
            planned=sum(m.get("planned") or 0 for m in manifests),
            failed=sum(m.get("failed") or 0 for m in manifests),
            elapsed=sum(m.get("elapsed_seconds") or 0.0 for m in manifests),
            started=min((m["started"] for m in manifests if m.get("started")), default=None),
        )


def read_batches(paths: list[Path]) -> Iterator[pyarrow.RecordBatch]:
    """Stored rows of shards and journals, 256 at a time.

    Raises:
        ValueError: a file is damaged, or was moved meanwhile by a run that goes on.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    columns = schema()
    for path in paths:
        try:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=256, columns=columns.names):
                        whole = batch.schema.names == columns.names
                        # Older versions had fewer columns.
                        yield batch if whole else pyarrow.RecordBatch.from_pylist(batch.to_pylist(), columns)
            else:
                rows: list[dict[str, Any]] = []
                for row in read_rows([path]):
                    rows.append(row)
                    if len(rows) == 256:
                        yield pyarrow.RecordBatch.from_pylist(rows, columns)
                        rows = []
                if rows:
                    yield pyarrow.RecordBatch.from_pylist(rows, columns)
        except FileNotFoundError:
            raise ValueError(f"{path}: is gone; the run is finishing a shard. Try again.") from None
        except (pyarrow.ArrowException, KeyError) as error:
            raise ValueError(f"{path}: is damaged or no shard of a run: {error}") from None


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)
