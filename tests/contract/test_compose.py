"""docker-compose.yml and deploy/Dockerfile: valid, complete, and open to nobody but this machine."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for

from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES
from ringfence.messages.api import PORTS

ROOT = Path(__file__).parents[2]
SERVICES = (*SERVICE_ROLES, *ON_DEMAND)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def test_it_follows_the_compose_specification(compose: dict[str, Any]) -> None:
    # check-jsonschema ships the schema that the Compose project publishes.
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    errors = validator_for(schema)(schema).iter_errors(compose)
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
    assert PORTS.keys() == set(SERVICES)
    assert len(set(PORTS.values())) == len(PORTS)


def test_no_service_is_forgotten(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*SERVICES, "kafka", "valkey", "topics"}
    profiles = {
        name: service["profiles"] for name, service in compose["services"].items() if "profiles" in service
    }
    assert profiles == {name: [name] for name in ON_DEMAND}
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


def test_nothing_is_reachable_from_outside_this_machine(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
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


def test_what_is_written_to_is_a_volume_that_any_user_of_the_image_may_write(compose: dict[str, Any]) -> None:
    for name in SERVICES:
        for volume in compose["services"][name].get("volumes", ()):
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
