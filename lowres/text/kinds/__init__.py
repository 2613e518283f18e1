"""The kinds of file. Each describes itself in a file of this package that ends with `register`."""

from lowres.text.kinds import arrow, json_lines, parquet, plain, tokens
from lowres.text.kinds.registry import KINDS, Kind, Rank, kind_of_name, names

__all__ = [
    "KINDS",
    "Kind",
    "Rank",
    "arrow",
    "json_lines",
    "kind_of_name",
    "names",
    "parquet",
    "plain",
    "tokens",
]
