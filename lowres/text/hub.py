"""Data sets on the Hugging Face hub.

The `datasets` library says which files a config and a split have, and of which commit. JSON, CSV, text and
parquet are then read like local files: `datasets` itself takes a column whose texts look like dates for
dates, numbers among texts for numbers, "NA" in a table for nothing, lines of a text for documents, and the
end of a truncated .zst file for its end. Other formats have types of their own, and it reads them.

A lost connection does not lose the row that was next. What is wrong with the data set itself (not found,
another schema, damaged) is an error at once.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from lowres.errors import UserError
from lowres.text.connection import Patience
from lowres.text.descriptions import looks_like_data
from lowres.text.globs import matches
from lowres.text.kinds import kind_of_name
from lowres.text.remote import RemoteFile
from lowres.text.source import Source, hub_name
from lowres.text.walk import UNKNOWN, Found

# builders whose files are read here; those that would rewrite the text may be read in no other way
_OURS = ("json", "csv", "text", "parquet")
_EXACT = ("parquet",)
# keys of a builder's config that do not change what is in its files
_HARMLESS = ("name", "version", "data_dir", "data_files", "description", "features")
_DEFAULT_SPLIT = "train"
# versions of `datasets` in which the state no longer moves after it was loaded once (their issue 8308), so
# that a second lost connection would bring rows again
_STATES_THAT_STOP = ("5.0.0",)


class DataSet:
    """A config and a split of a data set, opened at one commit. Raises UserError.

    commit: None if it is not known. splits: the names of all. files: in their order; None if `rows` must be
    used.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._name = hub_name(source.name)
        self.split = self._name.split or _DEFAULT_SPLIT
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{source.name}: hf: sources need the package datasets: pip install datasets"
            ) from None
        self._datasets: Any = datasets
        # what is lost is said in one line, by `connection`
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self._builder = self._load()
        listed = getattr(self._builder.config, "data_files", None) or {}
        self.splits = [str(split) for split in listed or self._builder.info.splits or ()]
        if self.splits and self.split not in self.splits:
            raise UserError(f'{source.name}: no split "{self.split}"; it has {", ".join(self.splits)}')
        found = str(self._builder.hash)
        self.commit = found if re.fullmatch("[0-9a-f]{40}", found) else None
        self.files = self._files(listed)

    def notes(self) -> list[str]:
        """What the user should know of the files that are not read. Asks the hub once."""
        if self.files is None or len(getattr(self._builder, "builder_configs", ())) > 1:
            return []
        import huggingface_hub

        try:
            info = huggingface_hub.HfApi().dataset_info(self._name.dataset, revision=self.commit)
        except Exception:  # a note is not worth a run
            return []
        listed = getattr(self._builder.config, "data_files", None) or {}
        read = {_in_folder(str(url)) for urls in listed.values() for url in urls}
        names = [each.rfilename for each in info.siblings or () if each.rfilename not in read]
        lost = [name for name in names if looks_like_data(name)]
        if not lost:
            return []
        more = f" and {len(lost) - 3:,} more" if len(lost) > 3 else ""
        return [
            f"{self._source.name}: left out: {', '.join(lost[:3])}{more} (without a card that lists them, "
            "`datasets` takes files of one format, and in the splits that their names tell)"
        ]

    def rows(self, start: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` on, as `datasets` reads them."""
        patience, row = self._patience(), start
        opened: Any = None
        state: dict[str, Any] | None = None  # where it goes on; so the rows before are not read again
        version = getattr(self._datasets, "__version__", "")
        while True:
            try:
                if opened is None:
                    opened = self._builder.as_streaming_dataset(self.split).skip(row)
                elif state is not None:
                    opened.load_state_dict(state)
                for found in opened:
                    has_state = version not in _STATES_THAT_STOP and hasattr(opened, "state_dict")
                    state = opened.state_dict() if has_state else None
                    row += 1
                    patience.answered()
                    yield found
                return
            except Exception as error:  # all errors of `datasets` and its libraries
                if isinstance(error, UserError):
                    raise
                if state is None:
                    opened = None
                patience.wait(error)

    def _patience(self) -> Patience:
        config = getattr(self._datasets, "config", None)
        return Patience(self._source.name, getattr(config, "HF_HUB_OFFLINE", False))

    def _load(self) -> Any:
        """The builder of `datasets`."""
        load, patience = self._datasets.load_dataset_builder, self._patience()
        trust = {}
        if "trust_remote_code" in inspect.signature(load).parameters:
            trust["trust_remote_code"] = False  # version 3 would ask, and run a data set's script
        while True:
            try:
                builder = load(self._name.dataset, self._name.config, revision=self._source.commit, **trust)
                patience.answered()
                return builder
            except Exception as error:
                if isinstance(error, ValueError):
                    self._check_config()
                if self._source.commit and "Revision" in str(error):
                    raise UserError(
                        f"{self._source.name}: the hub no longer has the commit with which its tokens were "
                        f"begun ({self._source.commit}); remove their folder in data.cache to begin again"
                    ) from None
                patience.wait(error)

    def _check_config(self) -> None:
        """Raises UserError if the config is not one of the data set's."""
        try:
            names = self._datasets.get_dataset_config_names(self._name.dataset, revision=self._source.commit)
        except Exception:  # then the first error is the one to tell
            return
        if self._name.config not in names and (self._name.config or len(names) > 1):
            missing = f'no config "{self._name.config}"' if self._name.config else "it has several configs"
            raise UserError(
                f"{self._source.name}: {missing}; write hf:{self._name.dataset}:<config> with one of "
                f"{', '.join(names)}"
            )

    def _files(self, listed: Any) -> list[Found] | None:
        urls = self._chosen([str(url) for url in listed.get(self.split, ())])
        builder = self._builder_name()
        changed = self._changed_options()
        unknown = [url for url in urls if kind_of_name(url)[0] is None]
        if builder is None or not urls or ((changed or unknown) and builder in _EXACT):
            if self._source.include or self._source.exclude:
                raise UserError(
                    f"{self._source.name}: `datasets` reads files of this format, and it reads all of them; "
                    "leave out data.include and data.exclude"
                )
            return None
        if changed or unknown:
            why = f"the type of {_in_folder(unknown[0])} is unknown" if unknown else ""
            why = f"its card sets {', '.join(changed)}" if changed else why
            raise UserError(
                f"{self._source.name}: {why}, so its text might not arrive as is; download it (hf download "
                f"{self._name.dataset} --repo-type dataset --local-dir DIR) and set data.source=DIR"
            )
        return [self._found(url) for url in urls]

    def _chosen(self, urls: list[str]) -> list[str]:
        """Those that data.include and data.exclude leave."""
        include, exclude = self._source.include, self._source.exclude
        chosen = [
            url
            for url in urls
            if not any(matches(_in_folder(url), pattern) for pattern in exclude)
            and (not include or any(matches(_in_folder(url), pattern) for pattern in include))
        ]
        if urls and not chosen:
            raise UserError(
                f"{self._source.name}: data.include and data.exclude leave no file of its {len(urls):,}, for "
                f"example {_in_folder(urls[0])}"
            )
        return chosen

    def _builder_name(self) -> str | None:
        modules = {cls.__module__ for cls in type(self._builder).__mro__}
        ours = (name for name in _OURS if f"datasets.packaged_modules.{name}.{name}" in modules)
        return next(ours, None)

    def _changed_options(self) -> list[str]:
        """What the card says of how to read the files, beside which they are."""
        config = self._builder.config
        if not is_dataclass(config):
            return []
        plain = cast(Any, type(config))()
        return [
            each.name
            for each in fields(config)
            if each.name not in _HARMLESS and getattr(config, each.name) != getattr(plain, each.name)
        ]

    def _found(self, url: str) -> Found:
        name = _in_folder(url)
        return Found(
            name,
            Path(f"hf:{self._name.dataset}") / name,
            size=UNKNOWN,
            mtime_ns=0,
            remote=RemoteFile(self._source.name, url),
        )


def _in_folder(url: str) -> str:
    """The path of a file in its data set: hf://datasets/<owner>/<name>@<commit>/<path>."""
    return url.split("@", 1)[-1].split("/", 1)[-1] if "@" in url else url
