"""The generated references say what the code says, and their parts are complete."""

from __future__ import annotations

import ast
import enum
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate
from pydantic import BaseModel

import ringfence
import ringfence.testing
from ringfence.backends import Backend
from ringfence.kernel.base.settings import problems
from tests.support.audit_fixtures import AuditFixtures
from tests.support.audit_records import every_record
from tools.public_names import SNAPSHOT, import_all, read, settings_classes
from tools.references import http_apis, sdk
from tools.references.openapi.apis import APIS
from tools.references.sdk import constructor_docstring
from tools.references.settings import kind_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/reference"


def headings(page: str) -> set[str]:
    """The headings of a page that are one name."""
    return set(re.findall(r"^### `([^`]+)`$", (FOLDER / page).read_text(), re.MULTILINE))


def listed(kind: str) -> set[str]:
    """The names of one kind in the public contract."""
    return {name.removeprefix(f"{kind} ") for name in read(SNAPSHOT) if name.startswith(f"{kind} ")}


def test_the_references_are_up_to_date() -> None:
    # A process of its own: what other tests declare would be found as well.
    done = subprocess.run(
        [sys.executable, "-m", "tools.references", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_setting_error_code_and_event_code_is_there() -> None:
    assert headings("settings.md") == listed("setting")
    codes = {name for name in listed("error code") if not name.startswith("type ")}
    assert headings("error-codes.md") == codes
    text = (FOLDER / "event-codes.md").read_text()
    assert [code for code in listed("event") if f"| `{code}` |" not in text] == []


def test_every_public_name_of_the_sdk_is_there() -> None:
    import_all()
    text = sdk.reference()
    names = {name.split(".")[0] for name in listed("sdk") if not name.startswith("error ")}
    errors = {
        name.removeprefix("error ").split(".")[0] for name in listed("sdk") if name.startswith("error ")
    }
    shown = {name for name in names if f"### `{name}`\n" in text or f"- **`{name}`**" in text}
    assert names - shown == set()
    assert [name for name in sorted(errors) if f"- **`{name}`**" not in text] == []


async def test_every_event_has_described_fields_of_the_described_types() -> None:
    schema = json.loads((FOLDER / "unmapped-fields.json").read_text())
    described = jsonschema.Draft202012Validator({**schema, "additionalProperties": False})
    office = AuditFixtures()
    for name, record in every_record(office).items():
        event = await office.event(record)
        described.validate(event["unmapped"])
        code = event["metadata"]["event_code"]
        for field in event["unmapped"]:
            assert code in schema["properties"][field]["x-event-codes"], (name, field)


def test_a_field_that_is_not_described_would_be_found() -> None:
    schema = json.loads((FOLDER / "unmapped-fields.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            {"verified": {}, "source": {}, "secret": "x"}, {**schema, "additionalProperties": False}
        )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"verified": {}, "source": {}, "agent": 7}, schema)


@pytest.mark.parametrize("api", sorted(APIS))
def test_documents_are_valid_openapi(api: str) -> None:
    document = http_apis.document(api)
    assert document["openapi"] == "3.1.0"
    validate(document)
    ids = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("api", sorted(APIS))
def test_operations_are_described_in_full(api: str) -> None:
    document = http_apis.document(api)
    known = {name for name in listed("error code") if not name.startswith("type ")}
    incomplete: list[str] = []
    for where, methods in document["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {where}"
            if not re.fullmatch(r"[A-Z].*\.", operation["summary"]):
                incomplete.append(f"{name}: a summary is a sentence")
            for one in operation.get("parameters", []):
                if not one["description"].endswith(".") or "example" not in one:
                    incomplete.append(f"{name}: {one['name']} needs a description and an example")
                else:
                    jsonschema.validate(one["example"], one["schema"])
            if "requestBody" in operation:
                for body in operation["requestBody"]["content"].values():
                    jsonschema.validate(
                        body["example"], {**body["schema"], "components": document["components"]}
                    )
            if operation["security"] and not {"401", "303"} & operation["responses"].keys():
                incomplete.append(f"{name}: what does a caller without a credential get?")
            for status, answer in operation["responses"].items():
                incomplete += _incomplete_error(document, f"{name} {status}", int(status), answer, known)
    assert incomplete == []


def _incomplete_error(
    document: dict[str, Any], name: str, status: int, answer: dict[str, Any], known: set[str]
) -> list[str]:
    """What an error answer lacks: a body that fits its schema as the example, and codes that the reference has."""
    if status < 400:
        return []
    for media, body in answer.get("content", {}).items():
        if not media.endswith("json") or body["schema"].get("$ref", "").endswith("/Ready"):
            continue
        if "example" not in body:
            return [f"{name}: an error needs an example"]
        jsonschema.validate(body["example"], {**body["schema"], "components": document["components"]})
        codes = {one for member in body["schema"].get("properties", {}).values() for one in member["enum"]}
        codes |= {body["example"][member] for member in ("error", "code") if member in body["example"]}
        if "scim" not in media and (unknown := codes - known):
            return [f"{name}: {unknown} is in no list of error codes"]
    return []


def test_an_incomplete_error_is_found() -> None:
    schema = {"$ref": "#/components/schemas/Error"}
    document = {"components": {"schemas": {"Error": {"type": "object", "required": ["error"]}}}}
    answer = {"content": {"application/json": {"schema": schema}}}
    assert _incomplete_error(document, "GET /", 404, answer, set()) == ["GET /: an error needs an example"]
    answer["content"]["application/json"]["example"] = {"error": "none"}
    assert "in no list" in _incomplete_error(document, "GET /", 404, answer, {"not_found"})[0]
    assert _incomplete_error(document, "GET /", 404, answer, {"none"}) == []


_READ_QUERY = re.compile(
    r"""(?:query_params|query|asked)(?:\.get(?:list)?\(|\[)"(\w+)"|_(?:number|one_of|of)\w*\(request, "(\w+)\""""
)


@pytest.mark.parametrize("service", ["registry", "policy", "revoker", "audit", "scim", "signals"])
def test_every_query_parameter_that_is_read_is_described(service: str) -> None:
    text = "\n".join(file.read_text() for file in (ROOT / f"services/ringfence/{service}").rglob("*.py"))
    read_names = {name for match in _READ_QUERY.finditer(text) if (name := match[1] or match[2])}
    document = http_apis.document(service)
    described = {
        parameter["name"]
        for methods in document["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "query"
    }
    assert read_names - described == set()
    if service in ("policy", "audit"):
        assert {"limit", "after", "agent"} <= read_names, "the pattern finds what is read"


def _undescribed(where: str, function: Any, docstrings: str) -> list[str]:
    """The parameters of a function that its docstring, or one that it refers to, does not name."""
    names = [
        name
        for name in inspect.signature(function).parameters
        if name not in ("self", "cls", "args", "kwargs")
    ]
    return [
        f"{where}: {name}"
        for name in names
        if not name.startswith("_") and not re.search(rf"(?<![a-z_]){name}(?![a-z_])", docstrings)
    ]


def _described_in(cls: type, name: str) -> str:
    """The docstrings of a method: its own and its class's, those that it overrides, and what they refer to."""
    bases = [one for one in cls.__mro__ if one.__module__.startswith("ringfence")]
    own = [inspect.getdoc(vars(one)[name]) or "" for one in bases if name in vars(one)]
    text = "\n".join([*own, *(inspect.getdoc(one) or "" for one in bases), inspect.getdoc(Backend) or ""])
    for owner, other in re.findall(r"(?:[Ll]ike|[Ss]ee|[Aa]s|as of) `(?:(\w+)\.)?(\w+)`", "\n".join(own)):
        target = getattr(ringfence, owner, cls) if owner else cls
        text += "\n" + (inspect.getdoc(getattr(target, other, None)) or "")
    return text


@pytest.mark.parametrize("module", [ringfence, ringfence.testing], ids=lambda one: one.__name__)
def test_every_parameter_of_the_sdk_is_described(module: Any) -> None:
    missing: list[str] = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            missing += _undescribed(name, value, inspect.getdoc(value) or "")
        if not inspect.isclass(value) or issubclass(value, BaseModel | enum.Enum | Exception):
            continue
        for member in (one for one in dir(value) if not one.startswith("_")):
            function = inspect.unwrap(getattr(value, member))
            if inspect.isroutine(function):
                missing += _undescribed(f"{name}.{member}", function, _described_in(value, member))
        if constructor_docstring(value):
            text = f"{inspect.getdoc(value)}\n{inspect.getdoc(value.__init__)}"
            missing += _undescribed(f"{name}()", value.__init__, text)
    assert not missing, "\n".join(missing)


def test_a_parameter_without_description_would_be_found() -> None:
    def call(agent_id: str, ttl_s: int) -> None: ...

    assert _undescribed("call", call, "Call `agent_id` for `other_ttl_s`.") == ["call: ttl_s"]


FOR_OTHERS = {
    "RINGFENCE_CREDENTIAL", "RINGFENCE_LEASE", "RINGFENCE_TASK", "RINGFENCE_SSH_CONFIG",  # for the command of `exec`
    "RINGFENCE_GATEWAY_FOLDER", "RINGFENCE_GID", "RINGFENCE_ISSUER_PORT", "RINGFENCE_KEYS", "RINGFENCE_UID",  # compose
}  # fmt: skip
"""Names that the code has, and that no process of Ringfence reads as a setting."""


def test_every_variable_that_the_code_names_is_a_setting_of_the_reference() -> None:
    text = "\n".join(file.read_text() for file in (ROOT / "services").rglob("*.py"))
    named = set(re.findall(r"\bRINGFENCE_[A-Z][A-Z_]*[A-Z]\b", text))
    prefixes = {name for name in named if any(one.startswith(f"{name}_") for one in headings("settings.md"))}
    assert named - prefixes - FOR_OTHERS - headings("settings.md") == set()
    assert "RINGFENCE_GRACE_S" in named


def _wrong_values(kind: str) -> list[str]:
    """Values that a setting of this type and these bounds must refuse."""
    if not kind.startswith(("whole number", "number", "one of", "`true`")):
        return []
    least, most = re.search(r"from (\d+)", kind), re.search(r"to (\d+)", kind)
    return ["wrong"] + ([str(int(least[1]) - 1)] if least else []) + ([str(int(most[1]) + 1)] if most else [])


def test_settings_refuse_what_the_reference_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0
    for cls in settings_classes():
        prefix = str(cls.model_config.get("env_prefix") or "")
        for name, info in cls.model_fields.items():
            variable = f"{prefix}{name}".upper()
            for value in _wrong_values(kind_of(name, info)):
                with monkeypatch.context() as environment:
                    environment.setenv(variable, value)
                    found = problems(cls)
                assert any(line.startswith(f"{variable}:") for line in found), (variable, value, found)
                refused += 1
    assert refused > 150


def _wrong_calls(cls: type) -> list[str]:
    """The calls in the example of a class that its methods do not take."""
    (example,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(cls) or "", re.DOTALL)
    tree = ast.parse(example)
    (name,) = [one.optional_vars.id for node in ast.walk(tree) if isinstance(node, ast.AsyncWith)
               for one in node.items if isinstance(one.optional_vars, ast.Name)][:1]  # fmt: skip
    wrong: list[str] = []
    for node in (one for one in ast.walk(tree) if isinstance(one, ast.Call)):
        match node.func:
            case ast.Attribute(value=ast.Name(id=owner), attr=method) if owner in (name, cls.__name__):
                bound = [] if owner == cls.__name__ else [None]
                arguments = {one.arg: None for one in node.keywords if one.arg}
                try:
                    inspect.signature(getattr(cls, method)).bind(*bound, *node.args, **arguments)
                except (AttributeError, TypeError) as error:
                    wrong.append(f"{method}: {error}")
    return wrong


@pytest.mark.parametrize("name", ["Agent", "Administrator", "Sponsor", "Grantor"])
def test_the_example_of_a_class_calls_its_methods_as_they_are(name: str) -> None:
    assert _wrong_calls(getattr(ringfence, name)) == []


def test_an_example_with_a_wrong_call_would_be_found() -> None:
    class Example:
        """Has an example.

        ```python
        async with Example.connect() as one:
            await one.call(wrong=1)
        ```
        """

        @classmethod
        def connect(cls) -> None: ...

        def call(self, *, right: int) -> None: ...

    assert "call: " in _wrong_calls(Example)[0]
