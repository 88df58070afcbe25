"""A target's map from an OpenAPI document: what it proposes, and what it leaves denied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.commands.openapi_map import MAX_RULES, OpenApiMap, read_openapi
from ringfence.client.errors import InvalidCallError
from ringfence.model.http_targets import RequestMap


def read(tmp_path: Path, paths: dict[str, Any], *tags: str, **more: Any) -> OpenApiMap:
    file = tmp_path / "api.json"
    file.write_text(json.dumps({"openapi": "3.1.0", "paths": paths, **more}))
    return read_openapi(file, tags)


def operation(*tags: str) -> dict[str, Any]:
    return {"tags": list(tags)}


def actions(found: OpenApiMap, *requests: str) -> list[str]:
    """What the gateway makes of requests, as `verb resource`; empty where it denies."""
    rules = RequestMap(found.template.requests)
    acts = [rules.action(method, target) for method, _, target in (one.partition(" ") for one in requests)]
    return ["" if one is None else f"{one.verb} {one.resource}" for one in acts]


def test_operations_become_verbs_by_tag_and_method_and_resources_by_path(tmp_path: Path) -> None:
    orders = {"get": operation("Orders"), "post": operation("Orders"), "delete": operation("Orders")}
    found = read(
        tmp_path, {"/orders/{orderId}": orders, "/health": {"get": {}, "summary": "up?", "x-own": 1}}
    )
    assert actions(found, "GET /orders/7", "POST /orders/7", "DELETE /orders/7", "GET /health") == [
        "orders:read orders/7", "orders:write orders/7", "orders:delete orders/7", "read health",
    ]  # fmt: skip
    assert found.template.verbs == {
        "orders:delete": "operator", "orders:read": "none", "orders:write": "sponsor", "read": "none",
    }  # fmt: skip
    assert actions(found, "PUT /orders/7", "GET /orders", "GET /orders/7/items") == ["", "", ""]
    assert found.gaps == ()


@pytest.mark.parametrize(
    ("document", "path", "server"),
    [
        ({"servers": [{"url": "https://api.example/v3/"}]}, "/v3/pets", "https://api.example"),
        ({"servers": [{"url": "/v3"}]}, "/v3/pets", None),
        (
            {"servers": [{"url": "https://{at}.example/v2", "variables": {"at": {"default": "eu"}}}]},
            "/v2/pets",
            "https://eu.example",
        ),
        ({"swagger": "2.0", "host": "api.example", "basePath": "/v1"}, "/v1/pets", "https://api.example"),
        ({}, "/pets", None),
    ],
)  # fmt: skip
def test_path_of_the_first_server_precedes_all_paths(
    tmp_path: Path, document: dict[str, Any], path: str, server: str | None
) -> None:
    found = read(tmp_path, {"/pets": {"get": {}}}, **document)
    assert [rule.path for rule in found.template.requests] == [path]
    assert found.server == server
    assert "url" not in found.template.settings, "a document names no place for a secret"


@pytest.mark.parametrize(
    ("paths", "gap"),
    [
        ({"/files/{name}.{format}": {"get": {}}}, "text and parameter together"),
        ({"/graphql": {"post": {}}}, "its body says what is done"),
        ({"/all": {"trace": {}}}, "no verb is usual"),
        ({"/all": {"$ref": "other.json#/all"}}, "not written out"),
        ({"/all/": {"get": {}}}, "/all/"),
        ({"/a b": {"get": {}}}, "/a b"),
    ],
)
def test_operation_without_a_rule_is_named_and_denied(
    tmp_path: Path, paths: dict[str, Any], gap: str
) -> None:
    found = read(tmp_path, {**paths, "/known": {"get": {}}})
    assert [rule.path for rule in found.template.requests] == ["/known"]
    assert len(found.gaps) == 1
    assert gap in found.gaps[0]


def test_more_specific_path_of_another_verb_comes_first(tmp_path: Path) -> None:
    found = read(tmp_path, {"/{kind}": {"get": operation("any")}, "/me": {"get": operation("self")}})
    assert actions(found, "GET /me", "GET /you") == ["self:read me", "any:read you"]


@pytest.mark.parametrize(
    ("paths", "denied"),
    [
        ({"/a/{x}": {"get": operation("a")}, "/{y}/b": {"get": operation("b")}}, ["GET /a/1", "GET /1/b"]),
        ({"/a/{x}": {"get": operation("a")}, "/a/{y}": {"get": operation("b")}}, ["GET /a/1"]),
        ({"/{x}": {"post": operation("a")}, "/graphql": {"post": operation("a")}}, ["POST /graphql", "POST /1"]),
        ({"/f/{x}": {"get": operation("a")}, "/f/{x}.zip": {"get": operation("b")}}, ["GET /f/1.zip", "GET /f/1"]),
        ({"/jobs": {"post": operation("a")}, "/jobs?action=stop": {"post": operation("b")}}, ["POST /jobs"]),
        # One that is dropped leaves its requests to a third, which is dropped then as well.
        (
            {
                "/{x}/{y}": {"get": operation("c")},
                "/a/{x}": {"get": operation("a")},
                "/{y}/b": {"get": operation("b")},
            },
            ["GET /a/b", "GET /a/1", "GET /1/b", "GET /1/2"],
        ),
    ],
)  # fmt: skip
def test_requests_that_could_be_another_verb_are_denied(
    tmp_path: Path, paths: dict[str, Any], denied: list[str]
) -> None:
    found = read(tmp_path, {**paths, "/known": {"get": {}}})
    assert actions(found, *denied) == [""] * len(denied)
    assert len(found.gaps) >= len(paths) - 1


def test_overlap_of_the_same_verb_keeps_both(tmp_path: Path) -> None:
    found = read(tmp_path, {"/a/{x}": {"get": operation("a")}, "/{y}/b": {"get": operation("a")}})
    assert actions(found, "GET /a/b", "GET /c/b") == ["a:read a/b", "a:read c/b"]


def test_query_in_a_path_is_the_same_operation(tmp_path: Path) -> None:
    found = read(tmp_path, {"/a": {"post": operation("a")}, "/a?beta=true": {"post": operation("a")}})
    assert actions(found, "POST /a?beta=true") == ["a:write a"]
    assert found.gaps == ()


def test_only_operations_with_a_chosen_tag_have_rules(tmp_path: Path) -> None:
    paths = {
        "/issues/{n}": {"get": operation("issues")},
        "/issues/{n}/lock": {"put": operation("admin", "issues")},
        "/keys": {"get": operation("admin")},
        "/issues/secret": {"get": operation("admin")},
    }
    found = read(tmp_path, paths, "issues")
    assert actions(found, "PUT /issues/1/lock", "GET /keys") == ["issues:write issues/1/lock", ""]
    assert actions(found, "GET /issues/secret", "GET /issues/1") == ["", ""]
    assert [gap for gap in found.gaps if "GET /issues/secret, which has no rule" in gap] == list(found.gaps)


def test_document_in_yaml_is_read(tmp_path: Path) -> None:
    file = tmp_path / "api.yaml"
    file.write_text("openapi: 3.0.2\npaths:\n  /pet/{petId}:\n    get: {tags: [Pet Store]}\n")
    (rule,) = read_openapi(file, ()).template.requests
    assert (rule.verb, rule.path, rule.resource) == ("pet-store:read", "/pet/{pet_id}", "pet/{pet_id}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        ("a: [", "cannot read"),
        ("[]", "no OpenAPI document"),
        ('{"openapi": "1.2", "paths": {}}', "no OpenAPI document"),
        ('{"openapi": "3.0.0"}', "no OpenAPI document"),
        ('{"openapi": "3.0.0", "paths": {}}', "has no operation"),
    ],
)
def test_file_that_is_no_document_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "api"
    file.write_text(text)
    with pytest.raises(InvalidCallError, match=reason):
        read_openapi(file, ())


def test_document_with_more_operations_than_a_target_has_rules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidCallError, match="choose some with --openapi-tag"):
        read(tmp_path, {f"/p{n}": {"get": {}} for n in range(MAX_RULES + 1)})
