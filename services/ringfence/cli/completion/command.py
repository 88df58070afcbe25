"""`ringfence completion`: print the script that makes a shell complete command lines.

The scripts ask `ringfence __complete` for candidates, and never evaluate its answer. The first line of the answer says
what completes the word: `words`, `files` or `folders`. Each further line is a candidate. The scripts run `ringfence`
from the PATH, not the word that is typed: pressing TAB starts no other program.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Final, Literal

import typer

Shell = Literal["bash", "zsh", "fish"]

_BASH = r"""# Completion of ringfence for bash. Load it with: source <(ringfence completion bash)
_ringfence() {
    local line kind=
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ -z $kind ]]; then
            kind=$line
        else
            COMPREPLY+=("$line")
        fi
    done < <(command ringfence __complete bash "$2" "${COMP_LINE:0:COMP_POINT}" "${COMP_TYPE:-9}" "${COLUMNS:-80}" \
        2>/dev/null </dev/null)
    case $kind in
        words) compopt -o nosort 2>/dev/null ;;
        files) compopt -o default 2>/dev/null ;;
        folders) compopt -o dirnames 2>/dev/null ;;
    esac
}
complete -F _ringfence ringfence
"""

_ZSH = r"""#compdef ringfence
# Completion of ringfence for zsh. Load it after compinit with: source <(ringfence completion zsh)
_ringfence() {
    local -a lines
    lines=("${(@f)$(command ringfence __complete zsh "${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}" \
        2>/dev/null </dev/null)}")
    local kind=${lines[1]}
    shift lines
    case $kind in
        words)
            (( ${#lines} )) && _describe -V 'ringfence' lines
            ;;
        files)
            [[ $PREFIX == --*=* ]] && compset -P '*='
            _files
            ;;
        folders)
            [[ $PREFIX == --*=* ]] && compset -P '*='
            _files -/
            ;;
    esac
}
if [[ ${funcstack[1]} == _ringfence ]]; then
    _ringfence "$@"
else
    compdef _ringfence ringfence
fi
"""

_FISH = r"""# Completion of ringfence for fish. Load it with: ringfence completion fish | source
function __ringfence_complete
    set -l current (commandline -ct)
    set -l lines (command ringfence __complete fish (commandline -opc) "$current" 2>/dev/null </dev/null)
    set -l kind $lines[1]
    set -e lines[1]
    set -l option (string match -r -- '^--[^=]*=' "$current")
    set -l value (string replace -r -- '^--[^=]*=' '' "$current")
    switch "$kind"
        case words
            test (count $lines) -gt 0; and printf '%s\n' $lines
        case files
            printf "$option%s\n" (__fish_complete_path "$value")
        case folders
            printf "$option%s\n" (__fish_complete_directories "$value" '')
    end
end
complete -c ringfence -f -a '(__ringfence_complete)'
"""

SCRIPTS: Final[Mapping[Shell, str]] = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print the script that makes a shell complete commands, options, and ids.

    bash: source <(ringfence completion bash), in ~/.bashrc.

    zsh: source <(ringfence completion zsh), in ~/.zshrc after compinit.

    fish: ringfence completion fish > ~/.config/fish/completions/ringfence.fish

    Ids and names are those that you may see, by the identity that the command line or the settings name. Nothing is
    offered where no service answers within 1.5 s.
    """
    sys.stdout.write(SCRIPTS[shell])
