"""SCIM discovery endpoints (RFC 7644, 4): service provider configuration, resource types and schemas."""

from __future__ import annotations

from scim2_models import (
    AuthenticationScheme,
    Bulk,
    ChangePassword,
    ETag,
    Filter,
    Meta,
    Patch,
    Reference,
    ResourceType,
    Schema,
    ServiceProviderConfig,
    Sort,
)

from ringfence.scim.resources import Group, User

MAX_RESULTS = 200
"""The longest page of a list."""


def config(url: str) -> ServiceProviderConfig:
    """What is there and what is not."""
    return ServiceProviderConfig(
        patch=Patch(supported=True),
        bulk=Bulk(supported=False, max_operations=0, max_payload_size=0),
        filter=Filter(supported=True, max_results=MAX_RESULTS),
        change_password=ChangePassword(supported=False),
        sort=Sort(supported=True),
        etag=ETag(supported=False),
        authentication_schemes=[
            AuthenticationScheme(
                type=AuthenticationScheme.Type.oauthbearertoken,
                name="Bearer token",
                description="A token that `ringfence provisioner new-token` printed",
                spec_uri=Reference("https://datatracker.ietf.org/doc/html/rfc6750"),
                primary=True,
            )
        ],
        meta=Meta(resource_type="ServiceProviderConfig", location=f"{url}/ServiceProviderConfig"),
    )


def resource_types(url: str) -> dict[str, ResourceType]:
    """Users and groups, by id."""
    found = {}
    for model in (User, Group):
        one = ResourceType.from_resource(model)
        one.meta = Meta(resource_type="ResourceType", location=f"{url}/ResourceTypes/{one.id}")
        found[str(one.id)] = one
    return found


def schemas(url: str) -> dict[str, Schema]:
    """What users and groups are made of, by id."""
    found = {}
    for model in (User, Group):
        one = model.to_schema()
        one.meta = Meta(resource_type="Schema", location=f"{url}/Schemas/{one.id}")
        found[str(one.id)] = one
    return found
