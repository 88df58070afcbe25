"""`ringfence init`: make the trust root, the service keys and the first operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ringfence.cli.commands import bundle_changes
from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import note, output_folder, print_json, say
from ringfence.cli.shared.progress import progress
from ringfence.client.admin.key_rotation import OVERLAP_S, rotate_services
from ringfence.client.admin.key_rotation import renew as renewed
from ringfence.client.admin.key_rotation import rotate_root as root_rotated
from ringfence.client.admin.origins import NO_CHANGE, OriginChange, changed_origins, set_origins
from ringfence.client.admin.systemd_layout import write_systemd_layout
from ringfence.client.admin.trust_setup import (
    ON_DEMAND,
    TrustFolder,
    add_gateways,
    add_runners,
    add_services,
    load_root_and_bundle,
    make_trust,
    publish_bundle,
    publish_operator,
    publish_trust,
    require_newest,
    set_second_person,
)
from ringfence.client.admin.trust_setup import second_operator as second_operator_by
from ringfence.client.admin.user_keys import read_package
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import BusSettings, ServiceSettings, load
from ringfence.kernel.crypto.service_keys import files_before, next_file
from ringfence.messages.trust import SecondPerson, TrustBundle

_OPERATOR = "operator"
_FIRST_NAME = "First operator"


def init(
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=output_folder, help="Where to keep what is made.")
    ] = Path(".ringfence"),
    operator: Annotated[
        str | None,
        typer.Option(
            help="User id of the first operator. With --publish, later: their key and role are given to them anew.",
            show_default=_OPERATOR,
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Their name.")] = _FIRST_NAME,
    gateway: Annotated[
        list[str] | None,
        typer.Option("--gateway", metavar="NAME", help="A gateway that gets a key of its own. Repeatable."),
    ] = None,
    add_gateway: Annotated[
        list[str] | None,
        typer.Option(
            "--add-gateway",
            metavar="NAME",
            help="Sign the next trust bundle, with one more gateway, by the root that is there. Repeatable.",
        ),
    ] = None,
    add_runner: Annotated[
        list[str] | None,
        typer.Option(
            "--add-runner",
            metavar="NAME",
            help="Sign the next trust bundle, with one more runner: a service that agents let start runs of them. "
            "Repeatable.",
        ),
    ] = None,
    add_service: Annotated[
        list[str] | None,
        typer.Option(
            "--add-service",
            metavar="NAME",
            help=f"Sign the next trust bundle, with a key for a service ({', '.join(ON_DEMAND)}) "
            "that the trust was made without. Repeatable.",
        ),
    ] = None,
    oidc_issuer: bundle_changes.IssuerOption = None,
    jwks: bundle_changes.JwksOption = None,
    oidc_for: bundle_changes.ForOption = None,
    oidc_discovery: bundle_changes.DiscoveryOption = False,
    oidc_user_claim: bundle_changes.ClaimOption = "sub",
    oidc_user_suffix: bundle_changes.SuffixOption = None,
    oidc_external_id: bundle_changes.ExternalOption = False,
    oidc_emails_verified: bundle_changes.EmailsVerifiedOption = False,
    remove_oidc_issuer: bundle_changes.RemoveOption = None,
    rotate_service: Annotated[
        list[str] | None,
        typer.Option(
            "--rotate-service",
            metavar="NAME",
            help="Sign the next trust bundle, with new keys for a service or gateway beside its old ones. Repeatable.",
        ),
    ] = None,
    overlap_h: Annotated[
        int,
        typer.Option(
            "--overlap-hours",
            metavar="HOURS",
            min=0,
            max=8760,
            help="How long the old keys of a service still count.",
        ),
    ] = OVERLAP_S // 3600,
    compromised: Annotated[
        bool,
        typer.Option(
            "--compromised", help="With --rotate-service: the old keys were stolen, and end at once."
        ),
    ] = False,
    rotate_root: Annotated[
        bool,
        typer.Option(
            "--rotate-root",
            help="Make a new root, to which the old one hands over, and sign the next bundle by it.",
        ),
    ] = False,
    compromised_since: Annotated[
        datetime | None,
        typer.Option(
            "--compromised-since",
            metavar="UTC",
            help="With --rotate-root: what the old root signed after that moment is rejected.",
        ),
    ] = None,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew",
            help="Sign the next trust bundle: the same keys for another year, by the root that is there.",
        ),
    ] = False,
    sign_origin: bundle_changes.SignOption = None,
    session_origin: bundle_changes.SessionOption = None,
    end_origin: bundle_changes.EndOption = None,
    rp_id: bundle_changes.RpIdOption = None,
    second_operator: Annotated[
        Path | None,
        typer.Option(
            "--second-operator",
            metavar="FILE",
            help="A package of somebody's own key (ringfence key prove): the root makes them an operator, and from "
            "an hour later two people sign what gives more. With --publish.",
        ),
    ] = None,
    second_person: Annotated[
        SecondPerson | None,
        typer.Option(
            "--second-person",
            help="Sign the next trust bundle: commands that give more wait for a second person, or are reported only.",
        ),
    ] = None,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Put the bundle on Kafka, and with the first one the first operator; makes them where they are not.",
        ),
    ] = False,
    install: Annotated[
        Path | None,
        typer.Option(
            "--install",
            metavar="DIR",
            callback=output_folder,
            help="Lay out what systemd needs on a machine below a new folder: units, users, keys, settings.",
        ),
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Option(
            "--service",
            metavar="NAME",
            help="With --install: a service or gateway of that machine. Repeatable; all but runners if not given.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the offline root key, a key for each service, and the first operator's key."""
    if service and not install:
        raise typer.BadParameter("--service is about a machine: add --install")
    if not name.strip():
        raise typer.BadParameter("say what they are called", param_hint="--name")
    if compromised and not rotate_service:
        raise typer.BadParameter(
            "--compromised says of a service's key that it was stolen: add --rotate-service"
        )
    if compromised_since and not rotate_root:
        raise typer.BadParameter("--compromised-since is about the root: add --rotate-root")
    changes = (
        add_gateway,
        add_runner,
        add_service,
        rotate_service,
        rotate_root,
        renew,
        oidc_issuer,
        remove_oidc_issuer,
        second_operator,
        second_person,
        install,
    )
    if sum(map(bool, changes)) > 1:
        raise typer.BadParameter(
            "one change at a time: --add-gateway, --add-runner, --add-service, --rotate-service, --rotate-root, "
            "--renew, --oidc-issuer, --remove-oidc-issuer, --second-operator, --second-person or --install"
        )
    origin_change = bundle_changes.change_of(sign_origin, session_origin, end_origin, rp_id)
    if origin_change and sum(map(bool, changes)) > bool(renew):
        raise typer.BadParameter("one change at a time: origins change by themselves, or with --renew")
    settings, trust, result = load(BusSettings), TrustFolder(folder), _Result(wants_json(as_json))
    following: Callable[[], int] | None = None
    if add_gateway:
        following = partial(_add, trust, add_gateway, result)
    elif add_runner:
        following = partial(_add_runners, trust, add_runner, result)
    elif add_service:
        following = partial(_add_services, trust, add_service, result)
    elif rotate_service:
        overlap_s = 0 if compromised else overlap_h * 3600
        following = partial(_rotate_services, trust, rotate_service, result, overlap_s, compromised)
    elif rotate_root:
        following = partial(_rotate_root, trust, result, _moment_s(compromised_since))
    elif renew:
        following = partial(_renew, trust, result, origin_change)
    elif oidc_issuer:
        issuer = bundle_changes.IssuerOptions(
            oidc_issuer, jwks, oidc_for or [], discovery=oidc_discovery, claim=oidc_user_claim,
            suffix=oidc_user_suffix, external=oidc_external_id, emails_verified=oidc_emails_verified,
        )  # fmt: skip
        following = partial(_add_issuer, trust, issuer, result)
    elif remove_oidc_issuer:
        following = partial(_remove_issuer, trust, remove_oidc_issuer, result)
    elif second_person:
        following = partial(_set_second_person, trust, second_person, result)
    elif origin_change and trust.root_key.exists():
        following = partial(_set_origins, trust, origin_change, result)
    try:
        if install is not None:
            _install(trust, install, service or (), result)
        elif second_operator is not None:
            if not publish:
                raise typer.BadParameter("the second operator is made on Kafka: add --publish")
            _make_second_operator(trust, settings, second_operator, name, result)
        elif following is not None:
            if publish:  # before anything is signed: a new root could not be taken back
                run(require_newest(trust, settings))
            result.data["trust_bundle"] = following()
            _next_version(trust, settings, result, publish=publish)
        else:
            first = operator or (None if trust.root_key.exists() else _OPERATOR)
            if not (publish and trust.root_key.exists()):
                _make(trust, settings, first or _OPERATOR, gateway or ["gateway"], result, origin_change)
            if publish:
                _publish(trust, settings, first, name, result)
            else:
                result.line("Next: ringfence topics apply, then ringfence init --publish")
    finally:
        result.end()


@dataclass(slots=True)
class _Result:
    """The result of the command: printed line by line for people, as one document at the end for programs."""

    as_json: bool
    data: dict[str, Any] = field(default_factory=dict)

    def line(self, text: str) -> None:
        if not self.as_json:
            say(text)

    def end(self) -> None:
        if self.as_json and self.data:
            print_json({"published": False, **self.data})


def _make(
    trust: TrustFolder,
    settings: BusSettings,
    operator: str,
    gateways: list[str],
    result: _Result,
    change: OriginChange | None,
) -> None:
    rp_id, first_origins = changed_origins(change or NO_CHANGE, int(time.time()))
    fingerprint = make_trust(
        trust, settings.trust_domain, operator, gateways=gateways, rp_id=rp_id, origins=first_origins
    )
    result.data |= {
        "trust_bundle": 1,
        "trust_domain": settings.trust_domain,
        "trust_root": fingerprint,
        "root_key": str(trust.root_key),
        "service_keys": str(trust.path / "keys"),
        "operator_key": str(trust.user_key(operator)),
    }
    result.line(f"Trust root for {settings.trust_domain}, fingerprint:")
    result.line(f"  export RINGFENCE_TRUST_ROOT={fingerprint}")
    result.line(f"Root key:      {trust.root_key}   move it off this machine")
    result.line(f"Service keys:  {trust.path / 'keys'}   one file for each service, and no other")
    result.line(f"Operator key:  {trust.user_key(operator)}")
    if first_origins:
        _say_origins(load_root_and_bundle(trust)[1], result)


def _install(trust: TrustFolder, destination: Path, services: Sequence[str], result: _Result) -> None:
    made = write_systemd_layout(destination, trust, load(ServiceSettings), services)
    result.data |= {
        "folder": str(destination),
        "services": list(made.services),
        "left_out": list(made.left_out),
    }
    units = " ".join(f"ringfence@{one}" for one in made.services)
    result.line(f"{destination} holds the files of a machine that runs {', '.join(made.services)}.")
    result.line("Install the package there into /opt/ringfence. Then, as root:")
    result.line(f"  cp --recursive {destination}/. /")
    result.line("  systemd-sysusers && systemd-tmpfiles --create /etc/tmpfiles.d/ringfence.conf")
    result.line(f"  systemctl daemon-reload && systemctl enable --now {units}")
    if made.left_out:
        result.line(f"Left out, as it holds a password: {', '.join(made.left_out)}. Put it into drop-ins:")
        result.line(f"  systemctl edit ringfence@{made.services[0]}   # and the others")
    result.line(f"Then delete {destination}: it holds private keys.")


def _publish(
    trust: TrustFolder, settings: BusSettings, operator: str | None, name: str, result: _Result
) -> None:
    """Publish the bundle, and the first operator if they are named or the bundle is the first.

    A later bundle leaves operators alone: they may have been disabled since, and have other roles and keys.
    """
    version = load_root_and_bundle(trust)[1].version
    if operator is None and version == 1:
        operator = _operator_of_root(trust)
    if operator is None:
        _publishing(publish_bundle(trust, settings), result)
        result.line(f"Trust bundle {version} is on Kafka at {settings.kafka}.")
        result.line(
            "The first operator stays as they are; to give them their key and role anew: --operator NAME"
        )
    else:
        _publishing(publish_trust(trust, settings, operator, name), result)
        result.line(f"Trust bundle {version} and operator {operator} are on Kafka at {settings.kafka}.")
        result.data["operator"] = operator
    result.data |= {"trust_bundle": version, "published": True}
    _warn_of_replication(result)


def _set_second_person(trust: TrustFolder, mode: SecondPerson, result: _Result) -> int:
    bundle = set_second_person(trust, mode)
    begins = utc_text(bundle.second_person[-1].not_before)
    what = "wait for a second person" if mode == "required" else "take effect at once, and are reported"
    result.line(
        f"From {begins} on, commands that give more {what}. Publish trust bundle {bundle.version} before."
    )
    result.data["second_person"] = {"mode": mode, "not_before": bundle.second_person[-1].not_before}
    return bundle.version


def _make_second_operator(
    trust: TrustFolder, settings: BusSettings, file: Path, name: str, result: _Result
) -> None:
    """Publish the second operator, and a bundle that requires a second person, unless it does so already."""
    try:
        package = read_package(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCallError(f"cannot read {file}: {error}") from None
    command = second_operator_by(trust, package, name if name != _FIRST_NAME else package.user_id)
    run(require_newest(trust, settings))
    modes = load_root_and_bundle(trust)[1].second_person
    if not modes or modes[-1].mode != "required":
        result.data["trust_bundle"] = _set_second_person(trust, "required", result)
    _publishing(publish_operator(trust, settings, command), result)
    result.data |= {"operator": package.user_id, "published": True}
    result.line(f"Operator {package.user_id} is on Kafka at {settings.kafka}, with key {package.kid}.")


def _publishing(work: Coroutine[Any, Any, Any], result: _Result) -> None:
    with progress("publishing on Kafka, and waiting for the registry", as_json=result.as_json):
        run(work)


def _operator_of_root(trust: TrustFolder) -> str:
    """Return the user whose key was made with the root, if it is the only one."""
    operators = sorted(file.stem for file in trust.user_key(_OPERATOR).parent.glob("*.json"))
    return operators[0] if len(operators) == 1 else _OPERATOR


def _moment_s(since: datetime | None) -> int | None:
    """Return a time in seconds since 1970. Without a time zone it is UTC."""
    if since is None:
        return None
    at = since if since.tzinfo else since.replace(tzinfo=UTC)
    if at > datetime.now(UTC):
        raise InvalidCallError(
            f"--compromised-since {at.isoformat()} is still to come; say since when it was"
        )
    return int(at.timestamp())


def _next_version(trust: TrustFolder, settings: BusSettings, result: _Result, *, publish: bool) -> None:
    if publish:
        _publishing(publish_bundle(trust, settings), result)
        result.line(f"Trust bundle {result.data['trust_bundle']} is on Kafka at {settings.kafka}.")
        result.data["published"] = True
        _warn_of_replication(result)
    else:
        result.line("Next: ringfence init --publish")


def _warn_of_replication(result: _Result) -> None:
    """Warn where the topics of a cluster are on one broker. The bundle is published already: no failure counts."""
    from aiokafka.errors import KafkaError

    from ringfence.kernel.kafka.topics_admin import TopicsAdmin

    async def work() -> list[str]:
        async with TopicsAdmin(load(ServiceSettings)) as admin:
            return (await admin.replication()).warnings()

    try:
        warnings = run(work())
    except (RingfenceError, KafkaError):
        return  # it may lack the rights to look; `ringfence doctor` says what it cannot see
    for warning in warnings:
        note(f"warning: {warning}", "warning")
    if warnings:
        result.data["warnings"] = warnings


def _add(trust: TrustFolder, gateways: list[str], result: _Result) -> int:
    version = add_gateways(trust, gateways).version
    result.line(f"Trust bundle {version} has gateway {', '.join(gateways)} now.")
    for name in gateways:
        result.line(f"Its keys:  {trust.service_key(name)}, {trust.encryption_key(name)}")
    return version


def _add_runners(trust: TrustFolder, runners: list[str], result: _Result) -> int:
    version = add_runners(trust, runners).version
    result.line(f"Trust bundle {version} has runner {', '.join(runners)} now.")
    for name in runners:
        result.line(f"Its key:  {trust.service_key(name)}")
    result.line(
        "An agent lets it start runs by a selector: ringfence agent set-attestation AGENT --selector runner=NAME"
    )
    return version


def _add_services(trust: TrustFolder, names: list[str], result: _Result) -> int:
    version = add_services(trust, names).version
    result.line(f"Trust bundle {version} has {', '.join(names)} now.")
    for name in names:
        result.line(f"Its key:  {trust.service_key(name)}")
    return version


def _rotate_services(
    trust: TrustFolder, names: list[str], result: _Result, overlap_s: int, compromised: bool
) -> int:
    version = rotate_services(trust, names, overlap_s=overlap_s, compromised=compromised).version
    for name in names:
        for file in (trust.service_key(name), trust.encryption_key(name)):
            if next_file(file).exists():
                result.line(f"Its keys, until now and from now on:  {file}, {next_file(file)}")
        for file in files_before(trust.encryption_key(name)):
            result.line(f"Its key that leases of before may need:  {file}")
    ends = "end at once" if compromised else f"count for {overlap_s // 3600} h more"
    result.line(f"Trust bundle {version} has new keys of {', '.join(names)}; the old ones {ends}.")
    result.line(
        "Put all files where the service runs, before the bundle is on Kafka: it reads them by itself then."
    )
    return version


def _rotate_root(trust: TrustFolder, result: _Result, compromised_since_s: int | None) -> int:
    rotated = root_rotated(trust, compromised_since_s=compromised_since_s)
    result.data |= {"trust_root": rotated.fingerprint, "root_key": str(trust.root_key)}
    result.data["former_root_key"] = str(rotated.former)
    result.line(
        f"Trust bundle {rotated.bundle.version} is signed by a new root. What runs follows it by itself."
    )
    result.line("Whatever starts from now on should pin the new one:")
    result.line(f"  export RINGFENCE_TRUST_ROOT={rotated.fingerprint}")
    result.line(f"Root key:      {trust.root_key}   move it off this machine")
    result.line(f"The one before: {rotated.former}   destroy it once that bundle is on Kafka")
    return rotated.bundle.version


def _renew(trust: TrustFolder, result: _Result, change: OriginChange | None) -> int:
    bundle = renewed(trust, origins=change or NO_CHANGE)
    until = utc_text(bundle.exp, "%Y-%m-%d")
    result.line(f"Trust bundle {bundle.version} holds until {until}.")
    if change is not None:
        _say_origins(bundle, result)
    return bundle.version


def _set_origins(trust: TrustFolder, change: OriginChange, result: _Result) -> int:
    bundle = set_origins(trust, change)
    result.line(f"Trust bundle {bundle.version} has other origins now.")
    _say_origins(bundle, result)
    return bundle.version


def _say_origins(bundle: TrustBundle, result: _Result) -> None:
    in_force = [one for one in bundle.origins if one.not_after is None]
    for one in in_force:
        result.line(f"{'People sign at' if one.use == 'sign' else 'Sessions open at'}:  {one.origin}")
    if in_force:
        result.line(f"Passkeys are made for:  {bundle.rp_id}")
    result.data |= {
        "rp_id": bundle.rp_id,
        "origins": [one.model_dump(exclude_none=True) for one in bundle.origins],
    }


def _add_issuer(trust: TrustFolder, issuer: bundle_changes.IssuerOptions, result: _Result) -> int:
    version, sentence = bundle_changes.add(trust, issuer)
    result.line(sentence)
    return version


def _remove_issuer(trust: TrustFolder, issuer: str, result: _Result) -> int:
    version, sentence = bundle_changes.remove(trust, issuer)
    result.line(sentence)
    return version
