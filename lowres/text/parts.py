"""The part of each file, training, validation or test: as a card says it, or else by the names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lowres.errors import UserError
from lowres.text import card, splits
from lowres.text.kinds import KINDS, Rank, plain
from lowres.text.left_out import LeftOut
from lowres.text.source import TEST, TRAIN, File, Source, hub_name, is_stream
from lowres.text.walk import Found


@dataclass
class Cards:
    """What the cards of data sets say of the files below their folders. known: name -> split, "" if that is
    not said. elsewhere: name -> why a file that a card lists is not read. below: the names of all the files.
    """

    known: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    below: set[str] = field(default_factory=set)


def of_cards(source: Source, cards: list[Found], all_names: list[str], notes: list[str]) -> Cards:
    """Of the cards that list files which are there; for a file it is the nearest that counts. Raises
    UserError if none has the config that hf:<folder>:<config> asks for."""
    made, configs_there = Cards(), list[str]()
    asked = hub_name(source.name).config if is_stream(source) else None
    for f in sorted(cards, key=lambda f: f.name.count("/"), reverse=True):
        folder = f.name[: -len(card.CARD)]
        names = [name for name in all_names if name.startswith(folder) and name not in made.below]
        configs = card.configs(f.path)
        in_folder = [name[len(folder) :] for name in names]
        listed = [
            (config, {folder + name: split for name, split in config.splits(in_folder).items()})
            for config in configs
        ]
        there = [each for each in listed if each[1]]
        if configs and not there:
            notes.append(f"{f.name}: the card lists no file that is here, so the names of the files decide")
        if not there:
            continue
        configs_there += [config.name for config, _ in there]
        made.below |= set(names)
        chosen = next(
            (each for each in there if (each[0].default if asked is None else each[0].name == asked)),
            there[0],
        )
        others = [each for each in there if each is not chosen]
        made.known |= chosen[1]
        if source.include:  # of any configuration
            for _, found_of in others:
                made.known |= {name: split for name, split in found_of.items() if name not in made.known}
        elif others and asked is None:
            notes.append(
                f'the card has several configs: "{chosen[0].name}" is read, not '
                f"{', '.join(config.name for config, _ in others)}; data.include takes the files of another"
            )
        for config, found_of in others:
            made.elsewhere |= dict.fromkeys(found_of, f'of the card\'s config "{config.name}"')
    if asked is not None and asked not in configs_there:
        has = f"its card has {', '.join(configs_there)}"
        none = "it has no card with configs: leave it out"
        raise UserError(f'{source.name}: no config "{asked}"; {has if configs_there else none}')
    return made


def with_parts(files: list[File], known: dict[str, str], above: str) -> list[File]:
    """Programs have no splits, nor what is written beside them: their `tests/` are no test split."""
    stated = {name: splits.part_of_word(split) for name, split in known.items() if split}
    free = [f for f in files if f.name not in stated]
    program = {f.name for f in free if KINDS[f.kind].rank == Rank.PROSE} if _is_program(files) else set()
    found = dict[str, str]()
    for rule, chosen in (
        (splits.parts_of_code, [f.name for f in free if f.name in program]),
        (splits.parts, [f.name for f in free if f.name not in program]),
    ):
        found |= zip(chosen, rule([name.removeprefix(above) for name in chosen]), strict=True)
    made = [replace(f, part=stated.get(f.name) or found[f.name]) for f in files]
    if all(f.part == TEST for f in made) or not any(f.part == TRAIN for f in made):
        made = [replace(f, part=TRAIN) for f in made]
    return made


def _is_program(files: list[File]) -> bool:
    return any(f.kind == plain.SOURCE_CODE for f in files)


def of_split(source: Source, files: list[File], known: dict[str, str], left_out: list[LeftOut]) -> list[File]:
    """The files of hf:<folder>, with those of the split that it names as TRAIN. Raises UserError if there is
    no such split."""
    asked = hub_name(source.name).split
    if asked is None:
        return files
    split_of = {f.name: known.get(f.name) or f.part for f in files}
    if asked not in split_of.values():
        there = ", ".join(dict.fromkeys(split_of.values()))
        raise UserError(f'{source.name}: no split "{asked}"; it has {there}')
    kept = list[File]()
    for f in files:
        if split_of[f.name] == asked:
            kept.append(replace(f, part=TRAIN))
        elif f.part == TRAIN:
            left_out.append(LeftOut(f.name, f.size, f'of the split "{split_of[f.name]}"'))
        else:
            kept.append(f)
    return kept
