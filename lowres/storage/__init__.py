"""How weights are stored: what a tensor is, the number formats, and units of tensors in slabs.

specs     descriptions of a tensor and of a unit
formats   the interface of a storage, and the registry of number formats
dense     fp32 and bf16
int8      codes and scales
unit      a unit in memory: weights and optimizer state, each in one slab

A file with another format registers it when it is imported, which happens here.
"""

import importlib
import pkgutil

from lowres.storage.dense import Dense
from lowres.storage.formats import (
    DENSE_DTYPES,
    FORMATS,
    Format,
    Storage,
    compute_dtype,
)
from lowres.storage.int8 import Int8
from lowres.storage.specs import (
    ADAPTER,
    BIAS,
    EMBEDDING,
    LORA_A,
    LORA_B,
    MATRIX,
    NORM,
    Fields,
    TensorSpec,
    UnitSpec,
)
from lowres.storage.unit import (
    ADAPTERS,
    MASTER,
    MERGED,
    UPDATES,
    Unit,
    aligned,
    all_finite,
    field_bytes,
    fields_in,
    state_fields,
    weight_fields,
)

for _file in sorted(pkgutil.iter_modules(__path__), key=lambda file: file.name):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "ADAPTER",
    "ADAPTERS",
    "BIAS",
    "DENSE_DTYPES",
    "EMBEDDING",
    "FORMATS",
    "LORA_A",
    "LORA_B",
    "MASTER",
    "MATRIX",
    "MERGED",
    "NORM",
    "UPDATES",
    "Dense",
    "Fields",
    "Format",
    "Int8",
    "Storage",
    "TensorSpec",
    "Unit",
    "UnitSpec",
    "aligned",
    "all_finite",
    "compute_dtype",
    "dense",
    "field_bytes",
    "fields_in",
    "int8",
    "state_fields",
    "weight_fields",
]
