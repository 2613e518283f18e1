"""The kinds of file. Each describes itself in a file of this package that ends with `register`."""

from lowres.text.kinds import arrow, csv_table, json_file, json_lines, parquet, plain, tokens, unread, warc
from lowres.text.kinds.registry import KINDS, Kind, NotData, Rank, kind_of_name, names

__all__ = [
    "KINDS",
    "Kind",
    "NotData",
    "Rank",
    "arrow",
    "csv_table",
    "json_file",
    "json_lines",
    "kind_of_name",
    "names",
    "parquet",
    "plain",
    "tokens",
    "unread",
    "warc",
]
