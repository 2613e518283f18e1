"""`lowres completion`: a few lines for a shell, which ask this program what may stand at the cursor.

They pass the command line as it is written so far, and get one candidate a line; none means that a file may
stand there. What there is to complete is read from the parser and from the keys of a config.
"""

from __future__ import annotations

import argparse
import shlex

from lowres.cli.parser import make_parser
from lowres.errors import UserError

SCRIPTS = {
    "bash": """\
_lowres() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT}
    local word=${line##*[[:space:]]}
    COMPREPLY=($(lowres completion --line "$line" 2>/dev/null))
    # bash has broken the word at =, and replaces what comes after that
    [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _lowres lowres
""",
    "zsh": """\
#compdef lowres
_lowres() {
    local -a found keys
    found=(${(f)"$(lowres completion --line "${BUFFER[1,CURSOR]}" 2>/dev/null)"})
    keys=(${(M)found:#*=})
    found=(${found:#*=})
    (( $#keys )) && compadd -S '' -- $keys
    (( $#found )) && compadd -- $found
    (( $#keys || $#found )) || _files
}
compdef _lowres lowres
""",
    "fish": """\
function __lowres
    set -l found (lowres completion --line (commandline -cp | string collect) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c lowres -f -a '(__lowres)'
""",
}
# what the value of an option is, by its metavar
KEYS = ("section.key=value", "data.key=value", "section.key=value,value")


def run_completion(parsed: argparse.Namespace) -> None:
    if parsed.line is not None:
        print("".join(f"{word}\n" for word in candidates(parsed.line)), end="")
    elif parsed.shell is None:
        raise UserError(f"completion: give the shell, one of {', '.join(SCRIPTS)}")
    else:
        print(SCRIPTS[parsed.shell], end="")


def candidates(line: str) -> list[str]:
    """What may stand instead of the last word of a command line, which may be empty."""
    _, *before, word = _words(line) or ["", ""]
    parser: argparse.ArgumentParser = make_parser()
    awaited: argparse.Action | None = None  # an option that wants a value
    placed = 0
    for each in before:
        commands, option = _commands(parser), parser._option_string_actions.get(each)
        if awaited is not None:
            awaited = None
        elif option is not None:
            awaited = option if option.nargs is None else None
        elif each in commands:
            parser, placed = commands[each], 0
        elif not each.startswith("-"):
            placed += 1
    option_name, equals, value = word.partition("=")
    if awaited is None and equals and (option := parser._option_string_actions.get(option_name)):
        return [f"{option_name}={found}" for found in _values(option, value)]
    if awaited is not None:
        return _values(awaited, word)
    if word.startswith("-"):
        return [
            name
            for name, option in parser._option_string_actions.items()
            if name.startswith(word) and name.startswith("--") and option.help != argparse.SUPPRESS
        ]
    if commands := _commands(parser):
        return [name for name in commands if name.startswith(word)]
    places = [action for action in parser._actions if not action.option_strings]
    return _values(places[placed], word) if placed < len(places) else []


def _words(line: str) -> list[str]:
    """The words of a command line whose last one is not finished, as it is at the cursor."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        words.extend(lexer)
    except ValueError:  # inside quotes
        words.append(lexer.token or "")
    return words if not line or not line[-1].isspace() else [*words, ""]


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _values(action: argparse.Action, word: str) -> list[str]:
    found: list[str] = [str(choice) for choice in action.choices or ()]
    if action.metavar in KEYS:
        found = _of_config(word, "data" if str(action.metavar).startswith("data") else None)
    return [one for one in found if one.startswith(word)]


def _of_config(word: str, section: str | None) -> list[str]:
    """Keys of a config with an =, or what a key may be. section: the only one whose keys count."""
    from lowres.reference import keys

    key, equals, _ = word.partition("=")
    known = {name: values for name, values in keys().items() if section in (None, name.partition(".")[0])}
    if equals:
        return [f"{key}={value}" for value in known.get(key, ())]
    return [f"{name}=" for name in known]
