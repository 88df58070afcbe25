"""`ringfence key`: identity keys."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from pydantic import TypeAdapter, ValidationError

from ringfence.cli.shared.options import JsonOption, check_folder, settings, wants_json
from ringfence.cli.shared.output import kept_file, print_fields, print_json, say
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Name, SpiffeId, TargetId

app = typer.Typer(help="Make and show identity keys.", no_args_is_help=True)

_NAMES: Final[dict[str, TypeAdapter[str]]] = {
    "user": TypeAdapter(Name),
    "agent": TypeAdapter(Name),
    "target": TypeAdapter(TargetId),
}
_WHOLE: Final[TypeAdapter[str]] = TypeAdapter(SpiffeId)
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The key file.")]


@app.command()
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", callback=kept_file, help="The new key file.")],
    id: Annotated[
        str, typer.Option("--id", help="user/NAME, agent/NAME, target/NAME, or a whole SPIFFE ID.")
    ],
    alg: Annotated[Literal["ES256", "EdDSA"], typer.Option(help="The algorithm.")] = "ES256",
    as_json: JsonOption = False,
) -> None:
    """Make a key, write its private half to a new file of mode 0600, and print its public half."""
    key = SigningKey.generate(_spiffe(id), alg)
    check_folder(file)
    key.save(file)
    _print_key(file, key, wants_json(as_json))


@app.command()
def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """Print the public half of a key file: what others may see."""
    _print_key(file, SigningKey.load(file), wants_json(as_json))


@app.command()
def prove(
    file: FileArgument,
    invitation: Annotated[
        Path,
        typer.Option(
            "--invitation", metavar="FILE", help="The invitation (ringfence user invite); - reads stdin."
        ),
    ],
) -> None:
    """Prove that you have a new key, in answer to an invitation, and print the package for `ringfence user add-key`.

    Sends nothing, and needs no network. Run it where the key file is; the file itself goes nowhere.
    """
    from ringfence.client.admin.user_keys import prove as prove_key

    text = sys.stdin.read() if str(invitation) == "-" else _read(invitation)
    package = prove_key(SigningKey.load(file), text.strip(), int(time.time()))
    say(package.text())


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCallError(f"cannot read {file}: {error}") from None


def _spiffe(id: str) -> str:
    if id.startswith("spiffe://"):
        return _validate_id(_WHOLE, id)
    kind, _, name = id.partition("/")
    if kind not in _NAMES or not name or "/" in name:
        raise typer.BadParameter(f"{id!r}: write user/NAME, agent/NAME or target/NAME", param_hint="--id")
    return f"spiffe://{settings().trust_domain}/{kind}/{_validate_id(_NAMES[kind], name)}"


def _validate_id(names: TypeAdapter[str], text: str) -> str:
    """Refuse an id that nothing can be registered under. Otherwise the mistake would show only at registration."""
    try:
        return names.validate_python(text)
    except ValidationError as error:
        raise typer.BadParameter(
            f"{text!r} {explain(error).removeprefix('it: ')}", param_hint="--id"
        ) from None


def _print_key(file: Path, key: SigningKey, as_json: bool) -> None:
    jwk = key.public.model_dump(exclude_none=True)
    if as_json:
        print_json({"id": key.id, "kid": key.kid, "alg": key.alg, "jwk": jwk, "file": str(file)})
        return
    fields = {"id": key.id, "thumbprint": key.kid, "algorithm": key.alg}
    print_fields({**fields, "public JWK": str(jwk).replace("'", '"'), "private half": f"{file}"})
