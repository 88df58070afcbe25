"""docker-compose.yml and deploy/Dockerfile: valid, complete, and open to nobody but this machine."""

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema.validators import validator_for

from ringfence.cli.shared.settings_check import mistyped
from ringfence.client.admin.trust_setup import BY_NAME, ON_DEMAND, SERVICE_ROLES
from ringfence.client.settings import ClientSettings
from ringfence.gateway.settings import GatewaySettings
from ringfence.kernel.base.settings import ServiceSettings, problems
from ringfence.messages.api import GATEWAY_PORT, PORTS
from tests.support.compose import COMPOSE_FILE, ROOT, TLS_FILE, environment_of, loaded

SERVICES = (*SERVICE_ROLES, *ON_DEMAND)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return loaded(COMPOSE_FILE)


@pytest.mark.parametrize("file", [COMPOSE_FILE, TLS_FILE])
def test_compose_file_follows_its_specification(file: str) -> None:
    # check-jsonschema ships the schema that the Compose project publishes.
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    errors = validator_for(schema)(schema).iter_errors(loaded(file))
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_runs_by_its_own_command(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["command"] == ["serve", name]
    assert set(service["environment"]) >= {
        "RINGFENCE_HTTP",
        "RINGFENCE_ISSUER_URL",
        "RINGFENCE_KAFKA",
        "RINGFENCE_KEY_FILE",
        "RINGFENCE_REDIS_URL",
        "RINGFENCE_TRUST_DOMAIN",
        "RINGFENCE_TRUST_ROOT",
    }
    assert service["ports"] == [f"127.0.0.1:{PORTS[name]}:8080"]
    assert "/readyz" in service["healthcheck"]["test"][-1]
    assert service["depends_on"]["topics"] == {"condition": "service_completed_successfully"}


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_gets_its_own_key_and_no_other(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    # The issuer's tokens are signed by a key of their own, and what it keeps for gateways is sealed to another.
    own = {"RINGFENCE_KEY_FILE": name}
    if name == "issuer":
        own["RINGFENCE_ISSUER_TOKEN_KEY_FILE"] = "issuer-token"
        own["RINGFENCE_ISSUER_SEAL_KEY_FILE"] = "issuer-seal"
    if name == "gateway":
        own["RINGFENCE_GATEWAY_SEAL_KEY_FILE"] = "gateway-seal"
    given = service["secrets"][len(own) :]
    assert all(one.startswith(f"{name}-") for one in given)  # files that an operator writes for it
    assert not given or name in ON_DEMAND
    assert service["secrets"][: len(own)] == [f"{key}-key" for key in own.values()]
    for setting, key in own.items():
        assert service["environment"][setting] == f"/run/secrets/{key}-key"
        assert compose["secrets"][f"{key}-key"]["file"].endswith(f"/{key}.json")


def test_each_service_has_a_usual_port() -> None:
    assert PORTS.keys() == {*SERVICES, *BY_NAME}
    assert len(set(PORTS.values())) == len(PORTS)


def test_no_service_is_forgotten(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*SERVICES, "kafka", "valkey", "topics", "cli"}
    profiles = {
        name: service["profiles"] for name, service in compose["services"].items() if "profiles" in service
    }
    assert profiles == {name: [name] for name in (*ON_DEMAND, "cli")}
    assert {name.partition("-")[0] for name in compose["secrets"]} == set(SERVICES)
    assert compose["services"]["topics"]["command"] == ["topics", "apply"]


def test_the_broker_keeps_the_promises_of_the_design(compose: dict[str, Any]) -> None:
    kafka = compose["services"]["kafka"]["environment"]
    assert kafka["KAFKA_LOG_MESSAGE_TIMESTAMP_TYPE"] == "LogAppendTime"
    assert kafka["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    valkey = " ".join(compose["services"]["valkey"]["command"])
    assert "--appendonly yes" in valkey
    assert "--notify-keyspace-events Ex" in valkey
    assert "--maxmemory-policy noeviction" in valkey


@pytest.mark.parametrize("name", [*SERVICES, "topics", "cli"])
def test_compose_environment_holds_only_valid_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [variable for variable in os.environ if variable.startswith("RINGFENCE_")]:
        monkeypatch.delenv(variable)
    given = environment_of(name, {"RINGFENCE_TRUST_ROOT": "x" * 43}, tls=True)
    assert mistyped(given, {}) == []
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    assert {cls.__name__: problems(cls) for cls in (ServiceSettings, ClientSettings, GatewaySettings)} == {
        "ServiceSettings": [],
        "ClientSettings": [],
        "GatewaySettings": [],
    }


def test_variables_of_the_file_itself_are_not_taken_for_mistakes() -> None:
    text = (ROOT / COMPOSE_FILE).read_text()
    exported = {"RINGFENCE_UID", "RINGFENCE_GID", "RINGFENCE_KEYS", "RINGFENCE_GATEWAY_FOLDER"}
    assert all(f"${{{name}:-" in text for name in exported)
    assert mistyped(exported, {}) == []
    assert mistyped({"RINGFENCE_GATEWAY_FOLDERS_"}, {}) == [], "a prefix is enough"
    assert len(mistyped({"RINGFENCE_GATEWAY_FOLD"}, {})) == 1


def test_agents_on_this_machine_find_the_sockets_of_tasks(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    (folder,) = (volume for volume in gateway["volumes"] if isinstance(volume, dict))
    assert (folder["type"], folder["source"]) == ("bind", "${RINGFENCE_GATEWAY_FOLDER:-./.ringfence/gateway}")
    # A folder that Docker makes belongs to root, and the gateway could not write to it.
    assert folder["bind"] == {"create_host_path": False}
    assert "mkdir -p .ringfence/gateway " in (ROOT / COMPOSE_FILE).read_text()
    for setting in ("RINGFENCE_GATEWAY_SOCKETS", "RINGFENCE_GATEWAY_CA_FILE"):
        assert Path(gateway["environment"][setting]).parent == Path(folder["target"])


def test_agents_elsewhere_find_the_tls_port_by_the_names_of_its_certificate(compose: dict[str, Any]) -> None:
    tls = loaded(TLS_FILE)
    assert list(tls["services"]) == ["gateway"]
    gateway = tls["services"]["gateway"]
    host, _, port = gateway["environment"]["RINGFENCE_GATEWAY_LISTEN"].rpartition(":")
    assert (host, int(port)) == ("0.0.0.0", GATEWAY_PORT)
    assert gateway["ports"] == [f"127.0.0.1:{port}:{port}"]
    # Between the containers its name is that of the service.
    assert gateway["environment"]["RINGFENCE_GATEWAY_NAMES"] == f"localhost:{port},gateway:{port}"
    assert "subjectAltName=DNS:localhost,DNS:gateway" in (ROOT / "docs/containers.md").read_text()
    (folder,) = (one for one in compose["services"]["gateway"]["volumes"] if isinstance(one, dict))
    for setting in ("RINGFENCE_GATEWAY_TLS_CERT_FILE", "RINGFENCE_GATEWAY_TLS_KEY_FILE"):
        assert Path(gateway["environment"][setting]).is_relative_to(folder["target"])


def test_the_command_line_reaches_every_service_and_holds_no_key(compose: dict[str, Any]) -> None:
    cli = compose["services"]["cli"]
    assert "secrets" not in cli
    assert "volumes" not in cli
    assert "ports" not in cli
    for name in SERVICE_ROLES:
        assert cli["environment"][f"RINGFENCE_{name.upper()}_URL"] == f"http://{name}:8080"


def test_clients_on_this_machine_need_to_know_the_broker_alone(compose: dict[str, Any]) -> None:
    usual = ClientSettings.model_fields
    for name in SERVICE_ROLES:
        (port,) = compose["services"][name]["ports"]
        assert usual[f"{name}_url"].default == f"http://{port.rpartition(':')[0]}"
    kafka = compose["services"]["kafka"]
    assert "OUTSIDE://localhost:9093" in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert kafka["ports"] == ["127.0.0.1:9093:9093"]


def test_compose_publishes_ports_on_loopback_only(compose: dict[str, Any]) -> None:
    services = [*compose["services"].values(), *loaded(TLS_FILE)["services"].values()]
    assert [service for service in services if service.get("network_mode")] == []
    ports = [port for service in services for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert len({port.split(":")[1] for port in ports}) == len(ports), "two services publish one port"


IMAGES = {"kafka": "RINGFENCE_KAFKA_IMAGE", "valkey": "RINGFENCE_VALKEY_IMAGE"}


def test_every_image_has_one_version_and_those_of_others_may_be_named_by_digest(
    compose: dict[str, Any],
) -> None:
    for name, service in compose["services"].items():
        image = service["image"]
        if name in IMAGES:
            image = image.removeprefix(f"${{{IMAGES[name]}:-").removesuffix("}")
            assert image != service["image"]
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+", image), f"{name}: {image}"


def test_the_image_that_ours_is_built_on_may_be_named_by_digest(compose: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    default = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    assert default is not None
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == ["${PYTHON_IMAGE}"] * 2
    args = compose["services"]["topics"]["build"]["args"]
    assert args == {"PYTHON_IMAGE": f"${{RINGFENCE_PYTHON_IMAGE:-{default[1]}}}"}


def test_each_image_that_may_be_named_by_digest_is_explained() -> None:
    page, compose = (ROOT / "docs/containers.md").read_text(), (ROOT / "docker-compose.yml").read_text()
    for setting in (*IMAGES.values(), "RINGFENCE_PYTHON_IMAGE"):
        image = re.search(rf"\${{{setting}:-(\S+?)}}", compose)
        assert image is not None
        assert f"{setting}={image[1]}@sha256:..." in page
        assert f"imagetools inspect {image[1]}\n" in page


def test_no_container_has_a_capability_or_can_gain_one_or_is_root(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert "privileged" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        user = re.sub(r"\$\{\w+:-(\d+)\}", r"\1", service["user"])
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), name
        assert service.get("read_only", False) is (name != "kafka"), name


def test_the_image_is_built_once_and_before_who_uses_it(compose: dict[str, Any]) -> None:
    (builder,) = (name for name, service in compose["services"].items() if "build" in service)
    image = compose["services"][builder]["image"]
    for name in SERVICES:
        assert compose["services"][name]["image"] == image
        assert builder in compose["services"][name]["depends_on"]


def test_the_image_installs_what_the_lock_verified_and_is_not_root() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert "--require-hashes --requirement requirements.lock" in dockerfile
    final_stage = dockerfile[dockerfile.rindex("\nFROM ") :]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", final_stage, re.MULTILINE)
    assert 'ENTRYPOINT ["ringfence"]' in final_stage


def test_written_paths_are_volumes_writable_by_any_user(compose: dict[str, Any]) -> None:
    for name in SERVICES:
        volumes = compose["services"][name].get("volumes", ())
        for volume in (
            one for one in volumes if isinstance(one, str)
        ):  # of whom a folder is, its owner sees to
            place = volume.partition(":")[2]
            assert f"--mode 1777 {place}" in (ROOT / "deploy/Dockerfile").read_text(), name
            assert any(
                str(value).startswith(place) for value in compose["services"][name]["environment"].values()
            )


def test_the_image_is_built_from_nothing_that_is_missing() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
