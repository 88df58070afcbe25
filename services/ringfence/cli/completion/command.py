"""`ringfence completion`: print the script that makes a shell complete command lines."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ringfence.cli.completion.scripts import SCRIPTS, Shell


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
